"""A step planned ahead: every column and span mask of every layer and branch, and how many columns each head keeps.

Element masks are not planned: they are as large as the activations, and are made where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import masks
from .config import HiddenKeyConfig, rate_for, resolve_layers, threshold
from .errors import ConfigError, DataError
from .masks import SITES, BitMask
from .serialise import choice

_PATTERNS = {"column": 1, "span": 2}


@dataclass(frozen=True)
class PlanEntry:
    """One site of one layer: what :class:`StepPlan` finds its masks by, and what it needs to draw them."""

    layer: int
    site: str
    pattern: str
    heads: int
    threshold: int


class StepPlan:
    """The masks of one step. Bits are packed (see :class:`BitMask`), 1 = keep, columns past a document's length are 0.

    Attributes:
        entries: the planned sites, in the order given.
        samples, branches, lengths: (documents,) int64. A batch of B examples and two branches is 2 B documents.
        columns: of every mask.
        nbytes: memory of bits and counts.

    Example:
        >>> plan = plan_step("hiddenkey", step=3, sample_ids=[7, 9], lengths=[5, 4], layers=2, heads=4)
        >>> plan.mask(1, "attention").shape, plan.kept(1, "attention").shape
        ((4, 4, 1, 5), (4, 4))
    """

    def __init__(
        self,
        seed: int,
        step: int,
        entries: Sequence[PlanEntry],
        samples: NDArray[np.int64],
        branches: NDArray[np.int64],
        lengths: NDArray[np.int64],
        columns: int,
    ) -> None:
        self.entries = tuple(entries)
        self.samples, self.branches, self.lengths = samples, branches, lengths
        table = [(e.layer, SITES[e.site], _PATTERNS[e.pattern], e.heads, e.threshold) for e in self.entries]
        numbers = np.array(table, dtype=np.uint64).reshape(len(table), 5)
        self._words, self._counts = masks.fill_plan(seed, step, numbers, samples, branches, lengths, columns)
        self.columns = int(columns)
        ends = np.cumsum([entry.heads * len(samples) for entry in self.entries], dtype=np.int64).tolist()
        self._rows = {
            (entry.layer, entry.site): (end - entry.heads * len(samples), end, entry.heads)
            for entry, end in zip(self.entries, ends, strict=True)
        }

    def mask(self, layer: int, site: str) -> BitMask:
        """The mask of one site: (documents, heads, 1, columns), a view of the plan's own memory.

        Raises:
            ConfigError: nothing was planned there.
        """
        start, end, heads = self._find(layer, site)
        width = (self.columns + 31) // 32
        words = self._words[start * width : end * width]
        return BitMask(words.reshape(len(self.samples), heads, 1, width), self.columns)

    def all_to_torch(self, device: Any = "cpu") -> dict[tuple[int, str], Any]:
        """Every mask, ``(layer, site)`` -> bool tensor (documents, heads, 1, columns), in one transfer to ``device``."""
        if not self.entries:
            return {}
        width = (self.columns + 31) // 32
        every = BitMask(self._words.reshape(len(self._counts), 1, 1, width), self.columns).to_torch(device)
        return {
            place: every[start:end].view(len(self.samples), heads, 1, self.columns)
            for place, (start, end, heads) in self._rows.items()
        }

    def kept(self, layer: int, site: str) -> NDArray[np.uint32]:
        """How many columns each document and head keeps there: (documents, heads). Errors as :meth:`mask`."""
        start, end, heads = self._find(layer, site)
        return self._counts[start:end].reshape(len(self.samples), heads)

    def __contains__(self, place: object) -> bool:
        """Whether ``(layer, site)`` was planned."""
        return place in self._rows

    @property
    def nbytes(self) -> int:
        """Memory of bits and counts."""
        return self._words.nbytes + self._counts.nbytes

    def __repr__(self) -> str:
        return f"StepPlan({len(self.entries)} sites, {len(self.samples)} documents, {self.columns} columns)"

    def _find(self, layer: int, site: str) -> tuple[int, int, int]:
        try:
            return self._rows[layer, site]
        except KeyError:
            known = ", ".join(f"{entry.site} of layer {entry.layer}" for entry in self.entries[:4]) or "nothing"
            raise ConfigError(
                f"no mask was planned there (got {site!r} of layer {layer!r}); this plan holds {known}"
            ) from None


def plan_step(
    config: HiddenKeyConfig | str,
    step: int,
    sample_ids: Any,
    lengths: Any,
    *,
    layers: int,
    heads: int,
    decoder: bool = False,
    columns: int | None = None,
) -> StepPlan:
    """Plan one optimiser step of a model that is one stack of equal layers.

    An attached model plans by itself; this is for loaders that plan in their workers, for other frameworks and for
    looking at masks.

    Args:
        config: what to drop, or a preset's name. Its column and span patterns are planned, for each of its branches
            (two with a consistency of two passes, else one). A rate pattern sees the names ``layers.0``, ``layers.1``, ...
        step: the optimiser step, 0 <= step < 2**32.
        sample_ids: (B,) integers in [0, 2**40). lengths: (B,) integers, the examples' real lengths.
        layers: how many layers the stack has. heads: how many heads attention masks are drawn for: key/value heads
            with ``heads="group"``, else query heads.
        decoder: which layers ``layers="auto"`` means: of an encoder all, of a decoder the latter half.
        columns: of every mask; default max(lengths).

    Raises:
        ConfigError: a config or extent out of range.
        DataError: ids or lengths that are no integers in their range, or do not pair up.

    Example:
        >>> plan = plan_step("hiddenkey", step=3, sample_ids=[7, 9], lengths=[5, 4], layers=2, heads=4)
        >>> plan.mask(1, "attention").shape, plan.kept(1, "attention").shape
        ((4, 4, 1, 5), (4, 4))
    """
    config = HiddenKeyConfig.preset(config) if isinstance(config, str) else config
    for name, value, most in (("layers", layers, 1 << 10), ("heads", heads, 1 << 10), ("step", step, (1 << 32) - 1)):
        masks.check_integer(value, name, most)
    step, layers, heads = int(step), int(layers), int(heads)
    ids = masks.check_integers(sample_ids, "sample ids", (1 << 40) - 1).astype(np.int64)
    sizes = masks.check_integers(lengths, "lengths", 1 << 20).astype(np.int64)
    if len(ids) != len(sizes):
        raise DataError(
            f"there must be one length a sample (got {len(sizes)} lengths for {len(ids)} samples); pass both"
        )
    branches = branches_of(config)
    return StepPlan(
        config.seed,
        step,
        _entries(config, layers, heads, decoder),
        np.tile(ids, len(branches)),
        np.repeat(np.asarray(branches, dtype=np.int64), len(ids)),
        np.tile(sizes, len(branches)),
        int(sizes.max(initial=0)) if columns is None else columns,
    )


def branches_of(config: HiddenKeyConfig) -> tuple[int, ...]:
    """The branches of a step that draw masks: both passes of a two-pass loss, unless one of them drops nothing."""
    consistency = config.consistency
    return (0,) if consistency is None or consistency.kind == "js" else (0, 1)


def plannable(pattern: str, start: str = "uniform") -> bool:
    """Whether masks of this pattern can be planned: columns and spans, unless attention guides the span."""
    return pattern in _PATTERNS and start == "uniform"


def _entries(config: HiddenKeyConfig, layers: int, heads: int, decoder: bool) -> list[PlanEntry]:
    role = "decoder" if decoder else "encoder"
    chosen = resolve_layers(config.layers, None if decoder else layers, layers if decoder else None)[role]
    found = []
    for layer in sorted(chosen):
        for site, part, count in (("attention", config.attention, heads), ("ffn", config.hidden, 1)):
            if part is None or not plannable(part.pattern, getattr(part, "start", "uniform")):
                continue
            level = threshold(rate_for(config, part.rate, [f"layers.{layer}"]))
            if level:
                found.append(PlanEntry(layer, choice(site, SITES, "site"), part.pattern, count, level))
    return found
