"""What to drop, where, how often: the configuration of one attached model.

Position x pattern x compensation of "LoRA Meets Dropout under a Unified Framework" (arXiv 2403.00812), every cell
selectable. Standard library only, so that a config can be read and checked anywhere.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError, shown
from .serialise import Serialisable, choice

RATE_LEVELS = 1 << 16
POSITIONS = ("dropkey", "dropattention")
PATTERNS = ("element", "column", "span")
HEADS = ("group", "query")
STARTS = ("uniform", "attention")
KINDS = ("kl", "js", "jensen-shannon", "mse")
GRADIENTS = ("one", "both")
LAYER_RULES = ("auto", "all", "latter-half")
STREAM = "hk1"


def threshold(rate: float) -> int:
    """The 16-bit integer that a random lane must reach to be kept: floor(65536 rate + 0.5), 0..65536.

    Example:
        >>> threshold(0.1)
        6554
    """
    if type(rate) is not float or not 0.0 <= rate <= 1.0:  # in one breath: small masks take two microseconds
        rate = check_rate(rate, "rate", closed=True)
    return int(RATE_LEVELS * rate + 0.5)


def check_rate(rate: Any, name: str, closed: bool = False) -> float:
    """``rate`` as a float in [0, 1) (``closed``: [0, 1]), or a :class:`ConfigError`."""
    number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)  # NumPy's scalars are such, too
    if not number or not (0 <= rate < 1 or (closed and rate == 1)):
        raise ConfigError(
            f"{name} must be a number in [0, 1{']' if closed else ')'} (got {shown(rate)}); 0 drops nothing"
        )
    rate = float(rate)
    if not closed and rate > 0 and math.floor(RATE_LEVELS * rate + 0.5) in (0, RATE_LEVELS):
        raise ConfigError(
            f"{name} is nearer to 0 or 1 than masks can realise, whose rates are multiples of 2**-16 (got {shown(rate)}); "
            "use 0, or a rate between 2**-16 and 1 - 2**-16"
        )
    return rate


@dataclass(frozen=True)
class AttentionDrop(Serialisable):
    """Dropout inside attention.

    ``position``: ``"dropkey"`` masks logits before softmax (paper, section 3.1); ``"dropattention"`` masks weights after
    softmax and renormalises with a detached denominator, which biases its gradient: it may not train, see RESULTS.md.
    ``pattern``: ``"element"`` (every query-key pair), ``"column"`` (whole keys, for all queries of a head) or ``"span"``
    (one block of keys). ``rate`` in [0, 1).
    ``heads``: with grouped keys draw one mask a key/value head (``"group"``) or one a query head (``"query"``).

    Raises:
        ConfigError: an unknown position, pattern or ``heads``, a rate out of range.

    Example:
        >>> AttentionDrop(pattern="span", rate=0.2)
        AttentionDrop(position='dropkey', pattern='span', rate=0.2, heads='group')
    """

    position: str = "dropkey"
    pattern: str = "column"
    rate: float = 0.1
    heads: str = "group"

    def __post_init__(self) -> None:
        choice(self.position, POSITIONS, "attention position")
        choice(self.pattern, PATTERNS, "attention pattern")
        choice(self.heads, HEADS, "heads")
        object.__setattr__(self, "rate", check_rate(self.rate, "attention rate"))


@dataclass(frozen=True)
class HiddenDrop(Serialisable):
    """HiddenCut: dropout on the FFN output, before the residual add.

    ``pattern``: ``"element"`` (ordinary dropout), ``"column"`` (whole token vectors) or ``"span"`` (one block of tokens).
    ``rescale``: multiply what is kept by 1 / (1 - realised rate); ``None`` = elements only, as HiddenCut's own code.
    ``start``: where a span begins, ``"uniform"`` or ``"attention"`` (among the 40 % of tokens that receive most
    attention; spans only, outside the promise that masks are pure functions). ``rate`` in [0, 1).

    Raises:
        ConfigError: an unknown pattern or start, a rate out of range, a start that goes with spans alone.

    Example:
        >>> HiddenDrop("column", rate=0.05, rescale=True)
        HiddenDrop(pattern='column', rate=0.05, rescale=True, start='uniform')
    """

    pattern: str = "element"
    rate: float = 0.1
    rescale: bool | None = None
    start: str = "uniform"

    def __post_init__(self) -> None:
        choice(self.pattern, PATTERNS, "hidden pattern")
        choice(self.start, STARTS, "start")
        object.__setattr__(self, "rate", check_rate(self.rate, "hidden rate"))
        if not isinstance(self.rescale, bool | None):
            raise ConfigError(f"rescale must be true, false or null (got {self.rescale!r}); null follows the pattern")
        if self.start == "attention" and self.pattern != "span":
            raise ConfigError(
                f"only a span has a start that attention can guide (got pattern {self.pattern!r}); use pattern='span'"
            )


@dataclass(frozen=True)
class ElementDrop(Serialisable):
    """Element dropout at the ``input`` (token embeddings) or ``output`` (what the head receives) position.

    Raises:
        ConfigError: a ``rate`` outside [0, 1).

    Example:
        >>> ElementDrop(rate=0.02)
        ElementDrop(rate=0.02)
    """

    rate: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", check_rate(self.rate, "rate"))


@dataclass(frozen=True)
class Consistency(Serialisable):
    """The consistency term between two passes (paper, equations 11 and 12).

    ``kind``: ``"kl"`` (bidirectional, two masked passes), ``"js"`` (the paper's: KL to the pass without dropout),
    ``"jensen-shannon"`` (the textbook's, with the mixture) or ``"mse"`` (regression outputs). ``weight`` >= 0.
    ``gradient``: through ``"one"`` branch (the paper) or ``"both"`` (R-Drop).

    Raises:
        ConfigError: an unknown kind or gradient, a weight below 0, ``"js"`` with both gradients.

    Example:
        >>> Consistency("jensen-shannon", weight=0.5, gradient="both")
        Consistency(kind='jensen-shannon', weight=0.5, gradient='both')
    """

    kind: str = "kl"
    weight: float = 1.0
    gradient: str = "one"

    def __post_init__(self) -> None:
        choice(self.kind, KINDS, "consistency kind")
        choice(self.gradient, GRADIENTS, "consistency gradient")
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight < math.inf:
            raise ConfigError(f"consistency weight must be a number >= 0 (got {self.weight!r}); the default is 1")
        if self.kind == "js" and self.gradient == "both":
            raise ConfigError(
                "the undropped pass of 'js' carries no gradient (got gradient='both'); "
                "use gradient='one', or kind='jensen-shannon'"
            )
        object.__setattr__(self, "weight", float(self.weight))


@dataclass(frozen=True)
class HiddenKeyConfig(Serialisable):
    """Everything that one attached model drops. The defaults are the paper's HiddenKey at rate .1 (the paper searches .01 to .2).

    Args:
        attention, hidden, input, output: the positions; ``None`` leaves one alone.
        rate_pattern: regular expression on layer or module names -> rate, as peft's ``rank_pattern``: the first key
            that matches a whole name, or its end after a dot, replaces the rate.
        consistency: the two-pass term, or ``None`` for a single pass.
        layers: ``"auto"`` (encoders all, decoders the last n // 2), ``"all"``, ``"latter-half"``, or a list of layer
            numbers, which count decoder layers in an encoder-decoder unless written ``"encoder.3"``.
        seed: of every mask, 0 <= seed < 2**64.
        stream: the mask stream's name.

    Raises:
        ConfigError: a part of another kind, a seed out of range, an unknown stream, layers or patterns that say nothing. Whether
            the model has the layers is asked by :func:`~hiddenkey_rs.attach`.

    Example:
        >>> HiddenKeyConfig.preset("dropkey-column", rate=0.15).attention
        AttentionDrop(position='dropkey', pattern='column', rate=0.15, heads='group')
    """

    attention: AttentionDrop | None = field(default_factory=AttentionDrop)
    hidden: HiddenDrop | None = field(default_factory=HiddenDrop)
    input: ElementDrop | None = None
    output: ElementDrop | None = None
    rate_pattern: Mapping[str, float] = field(default_factory=dict)
    consistency: Consistency | None = field(default_factory=Consistency)
    layers: str | tuple[int | str, ...] = "auto"
    seed: int = 0
    stream: str = STREAM

    def __post_init__(self) -> None:
        for name, kind in _PARTS.items():
            part = getattr(self, name)
            if part is not None and not isinstance(part, kind):
                raise ConfigError(f"{name} must be a {kind.__name__} or None (got {part!r}); see its docstring")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed must be an integer in [0, 2**64) (got {self.seed!r}); 0 is a good one")
        choice(self.stream, (STREAM,), "stream")
        object.__setattr__(self, "layers", _check_layers(self.layers))
        object.__setattr__(self, "rate_pattern", _check_pattern(self.rate_pattern))

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def drops(self) -> bool:
        """Whether any position has a rate above 0."""
        return any(map(self.drops_by, (self.attention, self.hidden, self.input, self.output)))

    def drops_by(self, part: AttentionDrop | HiddenDrop | ElementDrop | None) -> bool:
        """Whether one of the positions has a rate above 0, its own or a pattern's."""
        return part is not None and (part.rate > 0 or any(self.rate_pattern.values()))

    @classmethod
    def preset(cls, name: str, rate: float | None = None, **changes: Any) -> HiddenKeyConfig:
        """A named cell of the paper's grid. ``rate``, in [0, 1), replaces every rate of it, ``changes`` any field.

        ``none``; ``{dropkey,dropattention,hiddencut}-{element,column,span}``; ``hiddenkey-minus`` (column DropKey +
        element HiddenCut), ``hiddenkey`` (+ kl), ``hiddenkey-js``, ``hiddenkey-input``, ``hiddenkey-output`` (minus +
        that position); ``r-drop`` (two passes on the model's own dropout, both with gradient).

        Raises:
            ConfigError: an unknown name or field, a rate out of range, or one for a preset without rates.

        Example:
            >>> HiddenKeyConfig.preset("dropkey-span", rate=0.15, seed=7).attention
            AttentionDrop(position='dropkey', pattern='span', rate=0.15, heads='group')
        """
        choice(name, PRESETS, "preset")
        if rate is not None and name in _RATELESS:
            raise ConfigError(
                f"the preset {name!r} drops nothing by itself (got rate={shown(rate)}); leave the rate out, or set the "
                "model's own dropout"
            )
        arguments = _preset(name, {} if rate is None else {"rate": rate})
        unknown = set(changes) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(
                f"unknown config field (got {sorted(unknown)[0]!r}); use one of {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**{**arguments, **changes})


_PARTS: dict[str, type[Serialisable]] = {
    "attention": AttentionDrop,
    "hidden": HiddenDrop,
    "input": ElementDrop,
    "output": ElementDrop,
    "consistency": Consistency,
}
_SINGLE = tuple(f"{position}-{pattern}" for position in (*POSITIONS, "hiddencut") for pattern in PATTERNS)
_RATELESS = ("none", "r-drop")
PRESETS = (
    "none",
    *_SINGLE,
    "hiddenkey-minus",
    "hiddenkey",
    "hiddenkey-js",
    "hiddenkey-input",
    "hiddenkey-output",
    "r-drop",
)


def _preset(name: str, rate: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {"attention": None, "hidden": None, "consistency": None}
    if name == "r-drop":
        return {**parts, "consistency": Consistency(gradient="both")}
    if name in _SINGLE:
        position, pattern = name.split("-")
        if position == "hiddencut":
            return {**parts, "hidden": HiddenDrop(pattern, **rate)}
        return {**parts, "attention": AttentionDrop(position, pattern, **rate)}
    if name != "none":
        parts |= {"attention": AttentionDrop(**rate), "hidden": HiddenDrop(**rate)}
    if name in ("hiddenkey", "hiddenkey-js"):
        parts["consistency"] = Consistency("kl" if name == "hiddenkey" else "js")
    if name in ("hiddenkey-input", "hiddenkey-output"):
        parts[name.removeprefix("hiddenkey-")] = ElementDrop(**rate)
    return parts


class RatePattern(Mapping[str, float]):
    """A read-only, hashable mapping of regular expressions to rates, in the order given."""

    def __init__(self, items: Mapping[str, float]) -> None:
        self._items = tuple(items.items())

    def __getitem__(self, key: str) -> float:
        return dict(self._items)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(key for key, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))


def rate_for(config: HiddenKeyConfig, rate: float, names: Sequence[str]) -> float:
    """The rate of a site that goes by ``names``: that of the first rate pattern that matches, else ``rate``."""
    for pattern, replacement in config.rate_pattern.items():
        if matches(pattern, names):
            return replacement
    return rate


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether a rate pattern matches one of ``names`` whole, or its end after a dot (as peft's ``rank_pattern``)."""
    return any(re.fullmatch(_whole(pattern), name) for name in names)


def _whole(pattern: str) -> str:
    """A rate pattern as it is matched; its own groups stay numbered from 1."""
    return rf"(?:.*\.)?(?:{pattern})"


def resolve_layers(
    layers: str | Sequence[int | str], encoder_layers: int | None, decoder_layers: int | None
) -> dict[str, frozenset[int]]:
    """Which layers of each stack drop: ``{"encoder": ..., "decoder": ...}``. ``None`` = there is no such stack.

    Raises:
        ConfigError: an entry that names a layer the model does not have.
    """
    counts = {"encoder": encoder_layers or 0, "decoder": decoder_layers or 0}
    if layers == "all":
        return {role: frozenset(range(count)) for role, count in counts.items()}
    latter = {role: frozenset(range(count - count // 2, count)) for role, count in counts.items()}
    if layers == "latter-half":
        return latter
    if layers == "auto":
        return {"encoder": frozenset(range(counts["encoder"])), "decoder": latter["decoder"]}
    found: dict[str, set[int]] = {"encoder": set(), "decoder": set()}
    plain = "encoder" if decoder_layers is None else "decoder"
    for entry in layers:
        role, _, number = entry.rpartition(".") if isinstance(entry, str) else (plain, "", str(entry))
        role = role or plain
        if int(number) >= counts[role]:
            raise ConfigError(
                f"a layer lies beyond the model (got {entry!r}, the {role} has {counts[role]} layer(s)); "
                "layers count from 0"
            )
        found[role].add(int(number))
    return {role: frozenset(numbers) for role, numbers in found.items()}


def _check_layers(layers: Any) -> str | tuple[int | str, ...]:
    if isinstance(layers, str):
        return choice(layers, LAYER_RULES, "layers rule")
    if not isinstance(layers, Sequence) or not layers:
        raise ConfigError(
            f"layers must be one of {', '.join(LAYER_RULES)} or a non-empty list of layers (got {layers!r}); "
            "to drop nothing use preset 'none'"
        )
    for entry in layers:
        number = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0
        if not number and not (isinstance(entry, str) and re.fullmatch(r"((encoder|decoder)\.)?\d+", entry)):
            raise ConfigError(
                f"a layer is a number >= 0, or written encoder.3 or decoder.3 (got {entry!r}); count from 0"
            )
    return tuple(layers)


def _check_pattern(pattern: Any) -> RatePattern:
    if not isinstance(pattern, Mapping):
        raise ConfigError(f"rate_pattern maps regular expressions to rates (got {pattern!r}); use {{}} for none")
    for key, rate in pattern.items():
        try:
            re.compile(_whole(key))
        except (re.error, TypeError) as error:
            raise ConfigError(f"a rate_pattern key is no regular expression (got {key!r}: {error}); mend it") from None
        check_rate(rate, f"rate_pattern[{key!r}]")
    return RatePattern({key: float(rate) for key, rate in pattern.items()})
