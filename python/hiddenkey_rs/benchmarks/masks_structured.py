"""Columns and spans, and a step of them planned ahead, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import masks, ops
from ..config import AttentionDrop, HiddenKeyConfig
from ..masks import BitMask, MaskKey
from ..plan import StepPlan, plan_step
from .harness import Case, Entrant, Goal, Pair, Row
from .peers import BERNOULLI, RATE, THRESHOLD, draws

PATTERNS = ("column", "span")
_KEY = MaskKey(seed=11, step=3, layer=2)
_GOAL_SHAPE = (24, 32, 16, 512)
_PLAN_GOALS = {"avx512": 1.0, "avx2": 2.0}  # milliseconds

Shape = tuple[int, int, int]


def cases(shape: Shape, layers: int, simd: str) -> Iterator[Case]:
    """Masks of ``shape`` (samples, heads, columns), and ``layers`` of them in a plan."""
    for pattern in PATTERNS:
        yield _masks(pattern, shape)
    for pattern in PATTERNS:
        yield _plan(pattern, shape, layers, simd)


def memory(shape: Shape, layers: int, about: Mapping[str, Any]) -> Iterator[Row]:
    """What a plan holds, against the packed bits alone."""
    batch, heads, columns = shape
    bits = layers * batch * heads * ((columns + 31) // 32) * 4
    sizes = {"layers": layers, "samples": batch, "heads": heads, "columns": columns}
    for pattern in PATTERNS:
        plan = _planner(pattern, shape, layers)()
        held = plan.nbytes
        views = [plan.mask(layer, "attention").words for layer in range(layers)]
        right = sum(view.nbytes for view in views) == bits and all(view.base is not None for view in views)
        yield Row(
            "masks",
            f"memory of a plan, {pattern}",
            sizes,
            1,
            "KiB",
            _exact(held),
            {"name": "packed bits", **_exact(bits)},
            Goal("speedup", 0.5),
            checked=right,
            about=about,
        )


def _exact(size: int) -> dict[str, Any]:
    return {"median": size / 1024, "p10": size / 1024, "p90": size / 1024, "n": 1}


def _masks(pattern: str, shape: Shape) -> Case:
    """One layer's masks, packed and as bool."""
    batch, heads, columns = shape
    ids, lengths = np.arange(batch), np.full(batch, columns)
    words = np.empty((batch, heads, 1, (columns + 31) // 32), np.uint32)
    keep = np.empty((batch, heads, 1, columns), np.bool_)

    def packed() -> BitMask:
        if pattern == "column":
            return masks.column(_KEY, ids, columns, RATE, heads=heads, out=words)
        return masks.span(_KEY, ids, lengths, RATE, heads=heads, out=words)

    def unpacked() -> NDArray[np.bool_]:
        return packed().to_bool(out=keep)

    expected = _expected(pattern, _KEY, shape)
    ours = [
        Entrant("packed", packed, lambda: torch.equal(packed().to_torch(), expected)),
        Entrant("as bool", unpacked, lambda: torch.equal(torch.from_numpy(unpacked()), expected)),
    ]
    decisions = batch * heads * columns
    peers = list(draws(decisions))
    pairs = [
        Pair(f"{pattern}, {mine.name}", mine.name, peer.name, first=peer.name == BERNOULLI)
        for mine in ours
        for peer in peers
    ]
    sizes = {"samples": batch, "heads": heads, "columns": columns}
    return Case("masks", sizes, "ns/decision", 1e9 / decisions, 1, [*ours, *peers], pairs, budget=0.3)


def _plan(pattern: str, shape: Shape, layers: int, simd: str) -> Case:
    """Bits and kept counts of every layer, from the config and the batch, as a loader would ask for them."""
    batch, heads, columns = shape
    plan = _planner(pattern, shape, layers)

    def right() -> bool:
        found = plan()
        for layer in range(layers):
            expected = _expected(pattern, MaskKey(seed=_KEY.seed, step=_KEY.step, layer=layer), shape)
            counts = torch.from_numpy(found.kept(layer, "attention").astype(np.int64))
            if not torch.equal(found.mask(layer, "attention").to_torch(), expected):
                return False
            if not torch.equal(expected.sum((2, 3)), counts):
                return False
        return True

    peers = list(draws(batch * heads * columns, times=layers))
    stated = (layers, *shape) == _GOAL_SHAPE and simd in _PLAN_GOALS
    goal = Goal("median", _PLAN_GOALS[simd]) if stated else None
    pairs = [
        Pair(f"plan, {pattern}", "ours", peer.name, goal if peer.name == BERNOULLI else None, peer.name == BERNOULLI)
        for peer in peers
    ]
    sizes = {"layers": layers, "samples": batch, "heads": heads, "columns": columns}
    return Case("masks", sizes, "ms", 1e3, 1, [Entrant("ours", plan, right), *peers], pairs)


def _planner(pattern: str, shape: Shape, layers: int) -> Callable[[], StepPlan]:
    batch, heads, columns = shape
    drop = AttentionDrop(pattern=pattern, rate=RATE)
    config = HiddenKeyConfig(attention=drop, hidden=None, consistency=None, layers="all", seed=_KEY.seed)
    ids, lengths = np.arange(batch), np.full(batch, columns)
    return lambda: plan_step(config, _KEY.step, ids, lengths, layers=layers, heads=heads)


def _expected(pattern: str, key: MaskKey, shape: Shape) -> Tensor:
    """The mask in torch's integer arithmetic, bool (samples, heads, 1, columns)."""
    batch, heads, columns = shape
    site, ids = ops.derive_key(*key.words), torch.arange(batch)
    if pattern == "column":
        return ops.column_keep(site, ids, columns, THRESHOLD, heads)
    return ops.span_keep(site, ids, torch.full((batch,), columns), columns, THRESHOLD, heads)
