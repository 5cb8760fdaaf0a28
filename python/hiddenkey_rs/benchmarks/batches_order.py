"""The order of an epoch: going to a place of it, and one epoch's worth of micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import BatchSampler as TorchBatchSampler
from torch.utils.data import DistributedSampler

from ..batches.order import Order
from ..loading.sampler import BatchSampler
from .batches_data import glue_lengths
from .harness import Case, Entrant, Goal, Pair

HUGE = 10**12
_BATCH = 32


def cases(sizes: tuple[int, ...], known: int) -> Iterator[Case]:
    """Seeks in epochs of ``sizes`` samples; an epoch of batches of ``known`` samples with lengths."""
    for size in sizes:
        yield _seek(size)
    yield _epoch(known)


def _seek(size: int) -> Case:
    """The sample at a place of the epoch, and, of smaller epochs, what torch does before it can say."""
    order = Order(7, 0, size)
    places = itertools.cycle(np.random.default_rng(6).integers(0, size, 64).tolist())

    def right() -> bool:
        chosen = np.random.default_rng(8).integers(0, size, 100).tolist()
        return all(order.position(order[place]) == place for place in chosen)

    entrants = [Entrant("ours", lambda: order[next(places)], right)]
    if size <= 10**7:
        sampler: DistributedSampler[int] = DistributedSampler(range(size), 2, rank=0, seed=7)  # type: ignore[arg-type]
        entrants.append(Entrant("DistributedSampler, its first", lambda: next(iter(sampler)), lambda: len(sampler) > 0))
    else:
        entrants.append(Entrant("ours, 2^20 samples", _small_seek(), lambda: True))
    goal = Goal("median", 20) if size == HUGE else None
    sizes = {"samples": size}
    return Case("batches", sizes, "us", 1e6, 1, entrants, [Pair("seek", "ours", entrants[1].name, goal)], budget=0.2)


def _small_seek() -> Callable[[], int]:
    order, places = Order(7, 0, 1 << 20), itertools.cycle(range(0, 1 << 20, 4099))
    return lambda: order[next(places)]


def _epoch(size: int) -> Case:
    """All micro-batches of one rank of two: ours sorted by length in windows, torch's random."""
    sampler = BatchSampler(glue_lengths(size), batch_size=2 * _BATCH, world_size=2)
    random: DistributedSampler[int] = DistributedSampler(range(size), 2, rank=0, seed=0)  # type: ignore[arg-type]
    theirs = TorchBatchSampler(random, _BATCH, drop_last=False)

    def ours() -> int:
        sampler.seek(0)
        return sum(1 for _ in sampler)

    def right() -> bool:
        ranks = [BatchSampler(glue_lengths(size), batch_size=2 * _BATCH, rank=rank, world_size=2) for rank in range(2)]
        seen = [number for rank in ranks for rows in rank for number in rows if number >= 0]
        return sorted(seen) == list(range(size))

    entrants = [
        Entrant("ours", ours, right, before=lambda: sampler.set_epoch(0)),
        Entrant("DistributedSampler", lambda: sum(1 for _ in theirs), lambda: len(theirs) == sampler.steps),
    ]
    pairs = [Pair("an epoch of micro-batches", "ours", "DistributedSampler")]
    return Case("batches", {"samples": size}, "ms", 1e3, 1, entrants, pairs)
