"""Element masks, packed and as bool: against other generators, by size, by threads, and in small calls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from .. import masks, ops
from ..masks import BitMask, MaskKey
from .harness import Case, Entrant, Goal, Pair
from .machine import set_threads
from .peers import BERNOULLI, RATE, THRESHOLD, draws

FULL = 26
"""The goals are stated for 2**26 decisions."""
PACKED_GOALS = {"avx512": 50, "avx2": 20, "portable": 8}
BOOL_GOALS = {"avx512": 40, "avx2": 15, "portable": 6}
SMALL = "a call of 64 decisions"
LIMIT = "workers on masks of their own"
_KEY, _SAMPLE = MaskKey(seed=11, step=3, layer=2), 77
_COLUMNS = 1024
_WHOLE = 1 << 20  # masks up to here are compared bit by bit, larger ones by rows and by their count
_CHUNK = 1 << 20


class _Mask:
    """A case's mask: memory for it, the two ways to draw it, and whether what was drawn is right."""

    def __init__(self, size: int) -> None:
        self.columns = min(size, _COLUMNS)
        self.rows = size // self.columns
        self.ids = np.array([_SAMPLE])
        self.words = np.empty((1, 1, self.rows, (self.columns + 31) // 32), np.uint32)

    def packed(self) -> BitMask:
        return masks.element(_KEY, self.ids, self.rows, self.columns, RATE, out=self.words)

    def room(self) -> NDArray[np.bool_]:
        return np.empty((1, 1, self.rows, self.columns), np.bool_)

    def unpacked(self, out: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return masks.element_bool(_KEY, self.ids, self.rows, self.columns, RATE, out=out)

    def packed_right(self) -> bool:
        self.words[:] = 0
        return self.right(self.packed().to_bool())

    def right(self, drawn: NDArray[np.bool_]) -> bool:
        """Whether this is the reference's mask.

        The reference is stream hk1 in torch's integer arithmetic. Of masks too large for it 64 rows are compared. The
        count of all is compared with that of the operator that applies masks, whose code packs no bits.
        """
        key, found = ops.derive_key(*_KEY.words), torch.from_numpy(drawn.reshape(self.rows, self.columns))
        whole = self.rows * self.columns <= _WHOLE
        chosen = torch.arange(self.rows) if whole else torch.linspace(0, self.rows - 1, 64).long()
        expected = ops.row_keep(key, torch.full_like(chosen, _SAMPLE), chosen, self.columns, THRESHOLD)
        return torch.equal(expected, found[chosen]) and int(np.count_nonzero(drawn)) == self._count()

    def _count(self) -> int:
        """How many decisions keep, counted by the fused operator, a piece at a time."""
        keys, total = torch.tensor([ops.derive_key(*_KEY.words)]), 0
        step = max(_CHUNK // self.columns, 1)
        for start in range(0, self.rows, step):
            place = torch.arange(start, min(start + step, self.rows))
            hidden = torch.zeros(len(place), self.columns, dtype=torch.bfloat16)
            total += int(ops.drop_elements(hidden, keys, torch.full_like(place, _SAMPLE), place, THRESHOLD, 1.0)[1])
        return total


def small_call() -> Case:
    """What a call costs from Python: the smallest useful mask, its memory included."""
    mask = _Mask(64)

    def call() -> BitMask:
        return masks.element(_KEY, mask.ids, 1, 64, RATE)

    peers = list(draws(64))
    pairs = [Pair(SMALL, "ours", peer.name, _first(peer, Goal("median", 2.0)), _is_first(peer)) for peer in peers]
    ours = Entrant("ours", call, lambda: mask.right(call().to_bool()))
    return Case("masks", {"decisions": 64}, "us/call", 1e6, 1, [ours, *peers], pairs, budget=0.3)


def elements(exponent: int, threads: int, simd: str) -> Case:
    """2**exponent decisions, packed and as bool, against every peer, in one alternation."""
    size = 1 << exponent
    mask = _Mask(size)
    keep = mask.room()

    def unpacked_right() -> bool:
        keep[:] = False
        return mask.right(mask.unpacked(keep))

    ours = [
        Entrant("packed", mask.packed, mask.packed_right),
        Entrant("as bool", lambda: mask.unpacked(keep), unpacked_right),
    ]
    peers = list(draws(size, threads))
    goals = {"packed": PACKED_GOALS[simd], "as bool": BOOL_GOALS[simd]}
    stated = exponent == FULL and threads == 1
    pairs = []
    for mine in ours:
        goal = Goal("speedup", goals[mine.name]) if stated else None
        pairs += [
            Pair(f"element, {mine.name}", mine.name, peer.name, _first(peer, goal), _is_first(peer)) for peer in peers
        ]
    return Case("masks", {"decisions": size}, "ns/decision", 1e9 / size, threads, [*ours, *peers], pairs)


def scaling(exponent: int, few: int, many: int) -> Case:
    """More threads on one mask, and beside it what the machine allows: workers that share nothing and touch no memory."""
    mask = _Mask(1 << exponent)
    # Each worker's bits stay within its core's own cache, so that nothing but arithmetic can stand in the way.
    part = min(1 << exponent, _CHUNK)
    own = [_Mask(part) for _ in range(many)]
    calls = max((1 << exponent) // part, many) // many
    pool = ThreadPoolExecutor(many)

    def work(which: _Mask, times: int) -> None:
        for _ in range(times):
            which.packed()

    def workers() -> None:
        list(pool.map(work, own, [calls] * many))

    def checked(call: Callable[[], object], drawn: list[_Mask]) -> Callable[[], bool]:
        def right() -> bool:
            for each in drawn:
                each.words[:] = 0
            call()
            return all(each.right(BitMask(each.words, each.columns).to_bool()) for each in drawn)

        return right

    def alone() -> None:
        work(own[0], calls * many)

    entrants = [
        Entrant(f"{many} threads", mask.packed, mask.packed_right, lambda: set_threads(many)),
        Entrant(_threads(few), mask.packed, mask.packed_right, lambda: set_threads(few)),
        Entrant(f"{many} workers", workers, checked(workers, own), lambda: set_threads(1)),
        Entrant("1 worker", alone, checked(alone, own[:1]), lambda: set_threads(1)),
    ]
    goal = Goal("speedup", 1.8) if (few, many) == (1, 2) and exponent == FULL else None
    pairs = [
        Pair(f"{many} threads against {few}", entrants[0].name, entrants[1].name, goal),
        Pair(LIMIT, entrants[2].name, entrants[3].name),
    ]
    return Case("masks", {"decisions": 1 << exponent}, "ms", 1e3, many, entrants, pairs, budget=1.0)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _is_first(peer: Entrant) -> bool:
    return peer.name == BERNOULLI


def _first(peer: Entrant, goal: Goal | None) -> Goal | None:
    """Goals are stated against ``bernoulli_``."""
    return goal if _is_first(peer) else None
