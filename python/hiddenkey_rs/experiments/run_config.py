"""Every choice of a training run: one dataclass, from which flags, YAML keys and ``config.json`` are made."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from ..config import (
    GRADIENTS,
    HEADS,
    KINDS,
    PATTERNS,
    POSITIONS,
    PRESETS,
    AttentionDrop,
    Consistency,
    ElementDrop,
    HiddenDrop,
    HiddenKeyConfig,
)
from ..errors import ConfigError
from ..serialise import Serialisable, choice, field_types
from .tasks import KINDS as TASK_KINDS
from .tasks import TASKS

LOADERS = ("auto", "hiddenkey", "stock")


def _choice(default: Any, help_text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class RunConfig(Serialisable):
    """A training run. Flags of ``hiddenkey train`` are these fields with dashes; see their help texts."""

    model: str = _choice("minilm", "a folder, a hub name, minilm (demo extra) or gpt2-tiny (built in, random weights)")
    task: str | None = _choice(None, "a named task, from --data; those of GLUE without it from the hub", tuple(TASKS))
    data: str | None = _choice(None, "folder that holds the task folders")
    train_file: str | None = _choice(None, "own training data: .jsonl, .json or .csv (plain or .gz), or .parquet")
    dev_file: str | None = _choice(None, "own development data; without it a tenth of the training rows is held out")
    test_file: str | None = _choice(None, "own test data")
    dataset: str | None = _choice(None, "own data by its name in the datasets library")
    dataset_config: str | None = _choice(None, "configuration name of --dataset")
    kind: str = _choice("classification", "task of your own data", TASK_KINDS)
    text_fields: tuple[str, ...] = _choice(("sentence1", "sentence2"), "text fields of own data (lm: source target)")
    label_field: str = _choice("label", "label field of own data")
    train_size: int | None = _choice(None, "use N training rows, drawn by the seed; fewer are a subset of more")

    preset: str = _choice("hiddenkey", "what to drop", PRESETS)
    hiddenkey: str | None = _choice(None, "a HiddenKeyConfig file (.json, .yaml) in place of --preset")
    rate: float | None = _choice(None, "every rate of the preset")
    attention_position: str | None = _choice(None, "override: position inside attention", POSITIONS)
    attention_pattern: str | None = _choice(None, "override: pattern inside attention", PATTERNS)
    attention_rate: float | None = _choice(None, "override: rate inside attention")
    heads: str | None = _choice(None, "override: one mask a key/value head or a query head", HEADS)
    hidden_pattern: str | None = _choice(None, "override: HiddenCut's pattern", PATTERNS)
    hidden_rate: float | None = _choice(None, "override: HiddenCut's rate")
    hidden_start: str | None = _choice(None, "override: where a HiddenCut span starts", ("uniform", "attention"))
    rescale: bool | None = _choice(None, "override: rescale what HiddenCut keeps")
    input_rate: float | None = _choice(None, "override: rate on token embeddings")
    output_rate: float | None = _choice(None, "override: rate on what the head receives")
    consistency: str | None = _choice(None, "override: consistency term", (*KINDS, "none"))
    consistency_weight: float | None = _choice(None, "override: its weight")
    consistency_gradient: str | None = _choice(None, "override: branches that carry gradient", GRADIENTS)
    layers: tuple[str, ...] | None = _choice(None, "override: auto, all, latter-half, or layers (3 encoder.1 ...)")
    rate_pattern: tuple[str, ...] = _choice((), "override: REGEX=RATE for layers or modules whose name matches")
    stock_dropout: str | None = _choice(None, "the model's own dropout (default off; keep for r-drop)", ("keep", "off"))

    rank: int = _choice(8, "LoRA rank")
    alpha: float | None = _choice(None, "LoRA alpha (default 2 x rank)")
    lora_dropout: float = _choice(0.0, "peft's lora_dropout")
    target_modules: tuple[str, ...] | None = _choice(None, "modules that get LoRA (default: peft's for the family)")
    lr: float = _choice(3e-4, "peak learning rate")
    schedule: str = _choice(
        "linear", "learning-rate schedule", ("linear", "cosine", "constant", "constant_with_warmup")
    )
    warmup: float = _choice(0.06, "share of the steps that warm up")
    weight_decay: float = _choice(0.1, "AdamW's weight decay")
    label_smoothing: float = _choice(0.0, "label smoothing of the task loss")
    epochs: int = _choice(5, "passes over the training set")
    max_steps: int | None = _choice(None, "optimiser steps, in place of --epochs")
    batch_size: int = _choice(32, "rows of a micro-batch, on each process")
    accumulation: int = _choice(1, "micro-batches of an optimiser step, on each process")
    token_budget: int | None = _choice(None, "padded tokens of an optimiser step over all processes, in place of rows")
    loader: str = _choice("auto", "who makes batches (auto: hiddenkey on several processes)", LOADERS)
    fsdp: bool = _choice(False, "spread the weights over the processes (FSDP2, on accelerators)")
    eval_batch_size: int = _choice(64, "rows of an evaluation batch")
    max_length: int | None = _choice(None, "tokens an example keeps (default: the task's)")
    seed: int = _choice(0, "seeds data order, new weights and masks")
    bf16: bool = _choice(False, "bfloat16 autocast")
    activation_checkpointing: bool = _choice(False, "recompute activations in backward")
    train_eval_rows: int = _choice(500, "training rows that are also evaluated every epoch (0: all)")
    dev_rows: int | None = _choice(None, "development rows to evaluate (default: all)")
    log_every: int = _choice(10, "optimiser steps between log lines")
    save_steps: int | None = _choice(None, "optimiser steps between checkpoints (default: one an epoch)")
    log_masks: int = _choice(0, "write the digests of the masks of the first N logged steps to masks.jsonl")
    threads: int | None = _choice(None, "CPU threads of torch (default: torch's own)")
    out: str = _choice("runs/run", "the run's folder")

    def __post_init__(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices is not None and value is not None:
                choice(value, choices, item.name.replace("_", " "))
            object.__setattr__(self, item.name, self._typed(item.name, value))
        for name in ("rank", "epochs", "batch_size", "accumulation", "eval_batch_size", "log_every"):
            self._positive(name)
        for name in ("train_size", "max_steps", "max_length", "dev_rows", "save_steps", "threads", "token_budget"):
            if getattr(self, name) is not None:
                self._positive(name)
        for name in ("train_eval_rows", "log_masks"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name} must be at least 0 (got {getattr(self, name)!r}); mend --{name.replace('_', '-')}"
                )
        if self.token_budget is not None and self.loader == "stock":
            raise ConfigError(
                f"the stock loader makes batches of rows (got token_budget={self.token_budget}); use --loader hiddenkey"
            )
        if self.hiddenkey is not None and self.rate is not None:
            raise ConfigError(
                f"a config file brings its rates (got rate={self.rate} beside hiddenkey={self.hiddenkey!r}); give "
                "--attention-rate or --hidden-rate to change them, or leave one of the two out"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(
                f"the seed must lie in 0..2^32-1, as NumPy's generators ask (got {self.seed}); choose another"
            )
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"LoRA's alpha must be above 0 (got {self.alpha!r}); leave it out for 2 x rank")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must lie in [0, 1) (got {self.lora_dropout!r}); 0 is none")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"the learning rate must be above 0 (got {self.lr!r}); 3e-4 is a start")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"the weight decay must be at least 0 (got {self.weight_decay!r}); 0 is none")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share, in [0, 1] (got {getattr(self, name)!r}); 0 is none")
        sources = [name for name in ("task", "train_file", "dataset") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ConfigError(
                f"exactly one source of data is needed (got {sources or None}); give --task, --train-file or --dataset"
            )
        if self.label_smoothing and (self.kind if self.task is None else TASKS[self.task].kind) == "regression":
            raise ConfigError(
                f"labels that are numbers cannot be smoothed (got label_smoothing={self.label_smoothing}); leave it out"
            )
        if self.task is None and self.kind == "lm" and len(self.text_fields) != 2:
            raise ConfigError(
                f"a language-modelling task needs two text fields, source and target (got {list(self.text_fields)}); "
                "give --text-fields SOURCE TARGET"
            )
        if self.task not in (None, "demo") and self.data is None and TASKS[self.task].hub is None:
            raise ConfigError(
                f"a task that is in no library needs the folder of its files (got task {self.task!r} without data); "
                "give --data DIR"
            )

    def _typed(self, name: str, value: Any) -> Any:
        """``value`` if the field takes such; files and plans hold whatever their writer meant."""
        kind, several, optional = field_kind(name)
        if value is None and optional:
            return None
        if several:
            entries = value if isinstance(value, (list, tuple)) else [value]
            if all(type(entry) in (str, int) for entry in entries):
                return tuple(map(str, entries))  # layers are numbers in a file and words in a shell
        elif isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(value, bool):
            return value
        wanted = "a list of words" if several else _SPOKEN[kind]
        raise ConfigError(f"{name} must be {wanted} (got {value!r}); mend --{name.replace('_', '-')}")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if value < 1:  # whole it is, by its field's type
            raise ConfigError(f"{name} must be a whole number above 0 (got {value!r}); mend --{name.replace('_', '-')}")

    @property
    def lora_alpha(self) -> float:
        """``alpha``, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def stock(self) -> str:
        """What happens to the model's own dropout: off, as in the paper, unless the method lives on it."""
        return self.stock_dropout or ("keep" if self.preset == "r-drop" and self.hiddenkey is None else "off")

    def check(self) -> None:
        """Refuse choices that would do nothing, or something else than they say.

        Not at once, as a run that was begun before they were refused has them among its own.

        Raises:
            ConfigError: a field of another source of data; a change to a part that the preset has not.
        """
        source = next(name for name in ("task", *_OWN) if getattr(self, name) is not None)
        for name, owners in _OF_SOURCE.items():
            if getattr(self, name) != _DEFAULTS[name] and source not in owners:
                raise ConfigError(
                    f"{name} is of {' or '.join(owners)} (got {name}={getattr(self, name)!r} beside "
                    f"{source}={getattr(self, source)!r}), and would be ignored; leave one of the two out"
                )
        base = self._base()
        for part, (kind, given) in self._overrides().items():
            if given and getattr(base, part) is None and not given.keys() & _MAKING:
                name, value = next(iter(given.items()))
                raise ConfigError(
                    f"there is no {kind.__name__} to change (got {name}={value!r}); give its rate or pattern (a consistency "
                    "term's kind) as well, or leave it out"
                )

    def drops(self) -> HiddenKeyConfig:
        """The config to attach: the preset (or file) with the overrides."""
        base = self._base()
        changes: dict[str, Any] = {
            "rate_pattern": {**base.rate_pattern, **dict(_pattern(text) for text in self.rate_pattern)}
        }
        for part, (kind, given) in self._overrides().items():
            held = getattr(base, part)
            if given:
                changes[part] = replace(held, **given) if held is not None else kind(**given)
        if self.consistency == "none":
            changes["consistency"] = None
        if self.layers is not None:
            changes["layers"] = _layers(self.layers)
        return replace(base, **changes)

    def _base(self) -> HiddenKeyConfig:
        if self.hiddenkey is None:
            return HiddenKeyConfig.preset(self.preset, rate=self.rate, seed=self.seed)
        base = HiddenKeyConfig.from_file(self.hiddenkey)
        return base if base.seed else replace(base, seed=self.seed)  # a file that says none leaves it to the run

    def _overrides(self) -> dict[str, tuple[type[Any], dict[str, Any]]]:
        """Part of a config -> its kind, and what of it was given."""
        found: dict[str, tuple[type[Any], dict[str, Any]]] = {
            "attention": (
                AttentionDrop,
                {
                    "position": self.attention_position,
                    "pattern": self.attention_pattern,
                    "rate": self.attention_rate,
                    "heads": self.heads,
                },
            ),
            "hidden": (
                HiddenDrop,
                {
                    "pattern": self.hidden_pattern,
                    "rate": self.hidden_rate,
                    "rescale": self.rescale,
                    "start": self.hidden_start,
                },
            ),
            "input": (ElementDrop, {"rate": self.input_rate}),
            "output": (ElementDrop, {"rate": self.output_rate}),
        }
        if self.consistency != "none":
            term = {"kind": self.consistency, "weight": self.consistency_weight, "gradient": self.consistency_gradient}
            found["consistency"] = Consistency, term
        return {
            part: (kind, {name: value for name, value in given.items() if value is not None})
            for part, (kind, given) in found.items()
        }


_MAKING = {"rate", "pattern", "position", "kind"}
"""What switches a part on that the preset has not; everything else changes one that is there."""
_OWN = ("train_file", "dataset")
_OF_SOURCE = {
    "dev_file": ("train_file",),
    "test_file": ("train_file",),
    "dataset_config": ("dataset",),
    "kind": _OWN,
    "text_fields": _OWN,
    "label_field": _OWN,
}
_SPOKEN = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


@cache
def field_kind(name: str) -> tuple[type, bool, bool]:
    """Of a field of :class:`RunConfig`: (what it holds, whether several of them, whether it may be None)."""
    hint = field_types(RunConfig)[name]
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def _layers(entries: tuple[str, ...]) -> str | list[int | str]:
    if len(entries) == 1 and not str(entries[0]).rpartition(".")[2].isdigit():
        return str(entries[0])
    return [int(entry) if str(entry).isdigit() else str(entry) for entry in entries]


def _pattern(text: str) -> tuple[str, float]:
    pattern, equals, rate = text.rpartition("=")
    try:
        return pattern, float(rate) if equals else float("nan")
    except ValueError:
        raise ConfigError(f"a rate pattern is written REGEX=RATE (got {text!r}); for example layer.3=0.2") from None


_DEFAULTS = {item.name: item.default for item in fields(RunConfig)}
