"""Dataclasses to and from dictionaries, JSON, YAML and the side-car file beside an adapter. Unknown keys are refused."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Self

from .errors import ConfigError

CONFIG_NAME = "hiddenkey_config.json"
VERSION_KEY = "hiddenkey_version"


def choice(value: Any, allowed: Iterable[str], what: str) -> str:
    """``value`` if it is one of ``allowed``, else a :class:`ConfigError` with the nearest name."""
    options = tuple(allowed)
    if isinstance(value, str) and value in options:
        return value
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown {what} (got {value!r}); {hint}use one of {', '.join(options)}")


class Serialisable:
    """Mixin for frozen dataclasses that people keep in files."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_dict`; missing keys take their defaults, unknown ones are a :class:`ConfigError`."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__} is read from a mapping of its fields (got {values!r}); see to_dict()")
        hints = field_types(cls)  # type: ignore[arg-type]
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            choice(key, names, f"key in {cls.__name__}")
        return cls(**{key: _typed(hints[key], value) for key, value in values.items()})

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The reverse of :meth:`to_json`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the config is no JSON (got {error}); mend the file") from None
        return cls.from_dict(_without_version(values))

    def to_yaml(self) -> str:
        """YAML in field order."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The reverse of :meth:`to_yaml`."""
        import yaml

        try:
            values = yaml.load(text, yaml_loader())
        except yaml.YAMLError as error:
            raise ConfigError(f"the config is no YAML (got {' '.join(str(error).split())}); mend the file") from None
        return cls.from_dict(_without_version(values if values is not None else {}))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read ``.json``, ``.yaml`` or ``.yml``."""
        file = Path(path)
        text = read_text(file, "config")
        if file.suffix == ".json":
            return cls.from_json(text)
        if file.suffix in (".yaml", ".yml"):
            return cls.from_yaml(text)
        raise ConfigError(f"a config is a .json, .yaml or .yml file (got {str(file)!r}); rename it")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``hiddenkey_config.json`` into a folder, beside an adapter. The folder is made if it is missing."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        from importlib.metadata import version

        text = json.dumps({VERSION_KEY: version("hiddenkey_rs"), **self.to_dict()}, indent=2) + "\n"
        temporary = folder / f".{CONFIG_NAME}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / CONFIG_NAME)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Read ``hiddenkey_config.json`` from an adapter's folder (or the file itself)."""
        path = Path(directory)
        return cls.from_file(path / CONFIG_NAME if path.is_dir() else path)


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """A file's text, or a :class:`ConfigError` that calls it ``what``."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the {what} cannot be read (got {os.fspath(path)!r}: {reason}); check the file") from None


@functools.cache
def yaml_loader() -> Any:
    """PyYAML's safe loader, for which ``1e-3`` is a number, as in YAML 1.2 and everywhere else, and not a text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    exponent = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    return Loader


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields; evaluating them takes milliseconds, and a plan reads thousands of configs."""
    return typing.get_type_hints(cls)


def _without_version(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {key: value for key, value in values.items() if key != VERSION_KEY}


def _plain(value: Any) -> Any:
    if isinstance(value, Serialisable):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any) -> Any:
    """``value`` as the dataclass that its field's type names, if it names one."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if isinstance(value, Mapping) and is_dataclass(option) and issubclass(option, Serialisable):  # type: ignore[arg-type]
            return option.from_dict(value)  # type: ignore[union-attr]
    return value
