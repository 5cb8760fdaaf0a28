"""YAML whose values know their line, so that a complaint can name it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...serialise import read_text, yaml_loader
from ..extras import extra

Place = tuple[str | int, ...]


class Located:
    """A YAML file's values, and on which line the value at every path of keys stands.

    Raises:
        ConfigError: the file cannot be read, is no YAML, no mapping, or names a key twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        yaml = extra("yaml")
        try:
            self.text = read_text(self.path, "plan")
            loader = yaml_loader()(self.text)
            node = loader.get_single_node()
            self._lines: dict[Place, int] = {}
            if node is not None:
                self._walk(node, ())
            self.values = {} if node is None else loader.construct_document(node)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"the plan is no YAML (got {str(path)!r}: {' '.join(str(error).split())}); mend it"
            ) from None
        if not isinstance(self.values, Mapping):
            raise ConfigError(f"a plan is a mapping (got {type(self.values).__name__} in {str(path)!r}); see README")

    def line(self, place: Place) -> int:
        """The line of the value at ``place``, or of the nearest value around it."""
        while place not in self._lines and place:
            place = place[:-1]
        return self._lines.get(place, 1)

    def error(self, place: Place, what: str, mend: str) -> ConfigError:
        """A complaint about the value at ``place``: ``WHAT (got FILE, line N); MEND``."""
        where = f"{str(self.path)!r}, line {self.line(place)}"
        said = f"{what[:-1]} in {where})" if "(got " in what and what.endswith(")") else f"{what} (got {where})"
        return ConfigError(f"{said}; {mend}")

    def _walk(self, node: Any, place: Place) -> None:
        self._lines.setdefault(place, node.start_mark.line + 1)
        if node.id == "sequence":
            for number, item in enumerate(node.value):
                self._walk(item, (*place, number))
        elif node.id == "mapping":
            for key, value in node.value:
                if key.id != "scalar":
                    where = f"{str(self.path)!r}, line {key.start_mark.line + 1}"
                    raise ConfigError(f"a key is no word (got a {key.id} in {where}); write a name before the colon")
                inner = (*place, key.value)
                if inner in self._lines:
                    raise ConfigError(
                        f"a key stands twice (got {key.value!r} in {str(self.path)!r}, line {key.start_mark.line + 1}); "
                        "remove one"
                    )
                self._lines[inner] = key.start_mark.line + 1
                self._walk(value, inner)
