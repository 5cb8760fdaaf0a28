"""What a schedule does to a step: padding, and how evenly ranks are loaded. Counted, not timed; and ranks by simulation."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batches.order import Order
from ..experiments.extras import extra
from ..loading.sampler import BatchSampler
from .batches_data import glue_lengths
from .harness import Goal, Row, summary

Lengths = NDArray[np.int64]
WASTE, HEAVIEST = "padding", "heaviest rank over the mean"


def rows(budgets: Sequence[int], place: Mapping[str, Any]) -> Iterator[Row]:
    """Padding of an epoch of MRPC and SST-2, with micro-batches of so many tokens on one rank."""
    lengths = glue_lengths()
    for budget in budgets:
        waste = _waste(_parts(BatchSampler(lengths, token_budget=budget), lengths))
        peers = {
            "group_by_length": _grouped(lengths, _rows(lengths, budget)),
            "random order": _random(lengths, _rows(lengths, budget), 1),
        }
        right = _complete(BatchSampler(lengths, token_budget=budget), len(lengths), budget, lengths)
        for name, theirs in peers.items():
            goal = Goal("median", 3) if name == "group_by_length" else None
            yield _row(WASTE, {"tokens": budget}, "% of tokens", waste, name, _waste(theirs), goal, right, place)


def simulate(ranks: Sequence[int], place: Mapping[str, Any], size: int = 4_000_000, each: int = 4096) -> Iterator[Row]:
    """So many ranks share steps of ``each`` padded tokens a rank, of ``size`` examples drawn from MRPC and SST-2."""
    lengths = glue_lengths(size)
    for count in ranks:
        sizes = {"ranks": count, "examples": size}
        peak, planned, loads, waste, right = _simulated(lengths, count, each)
        others = _random_loads(lengths, count, _rows(lengths, each))
        spread, theirs = (_worst(found) for found in (loads, others))
        yield _row(HEAVIEST, sizes, "times", spread, "random order", theirs, Goal("median", 1.02), right, place)
        grouped = _grouped_loads(lengths, count, _rows(lengths, each))
        yield _row(HEAVIEST, sizes, "times", spread, "group_by_length", _worst(grouped), None, right, place)
        random = _waste(_random(lengths[:400_000], _rows(lengths, each), 1))
        yield _row(WASTE, sizes, "% of tokens", waste, "random order", random, Goal("median", 3), right, place)
        yield _row(
            "plan an epoch",
            sizes,
            "ms",
            1e3 * planned,
            "a torch permutation",
            1e3 * _permuted(size),
            None,
            right,
            place,
        )
        yield _row("memory of a rank", sizes, "MiB", peak, "a permutation, int64", 8 * size / 2**20, None, right, place)
    for samples in (10**9, 10**12):
        seconds = _seconds(lambda samples=samples: Order(3, 1, samples)[samples // 3])  # type: ignore[misc]
        small = _seconds(lambda: Order(3, 1, 10**6)[10**6 // 3])
        sizes = {"samples": samples}
        yield _row("seek", sizes, "us", 1e6 * seconds, "10^6 samples", 1e6 * small, Goal("median", 20), True, place)


def _simulated(lengths: Lengths, ranks: int, each: int) -> tuple[float, float, NDArray[np.float64], float, bool]:
    """(peak MiB of one rank's sampler, seconds to plan, loads (steps, ranks), waste in %, every example exactly once)."""
    tracemalloc.start()
    start = time.perf_counter()
    sampler = BatchSampler(lengths.astype(np.uint32), token_budget=ranks * each, world_size=ranks)
    steps = sampler.steps
    planned = time.perf_counter() - start
    for _ in sampler:
        pass
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    schedule, loads, tokens, seen = sampler.schedule, np.zeros((steps, ranks)), 0, 0
    step = 0
    for window in range(schedule.windows):
        batches = schedule.batches(0, window)
        for number in range(len(batches)):
            members = lengths[batches[number]]
            bounds = batches.bounds(number, ranks, 1)[:, 0]  # type: ignore[union-attr]
            sizes = bounds[:, 1] - bounds[:, 0]
            longest = np.where(sizes > 0, members[np.minimum(bounds[:, 0], len(members) - 1)], 0)
            loads[step] = sizes * longest
            tokens, seen, step = tokens + int(members.sum()), seen + len(members), step + 1
    return peak, planned, loads, 100 * (1 - tokens / loads.sum()), seen == len(lengths)


def _worst(loads: NDArray[np.float64]) -> list[float]:
    """The heaviest rank over the mean, of every step: what the others wait for."""
    return list(loads.max(axis=1) / loads.mean(axis=1))


def _rows(lengths: Lengths, tokens: int) -> int:
    """How many examples hold so many tokens, on average."""
    return max(1, int(tokens / lengths.mean()))


def _parts(sampler: BatchSampler, lengths: Lengths) -> Iterator[Lengths]:
    return (lengths[rows] for rows in sampler)


def _waste(parts: Iterator[Lengths]) -> float:
    """Padding, in % of all places."""
    places = tokens = 0
    for part in parts:
        places, tokens = places + len(part) * int(part.max()), tokens + int(part.sum())
    return 100 * (1 - tokens / places)


def _complete(sampler: BatchSampler, size: int, budget: int, lengths: Lengths) -> bool:
    seen = np.zeros(size, np.int64)
    for part in sampler:
        seen[part] += 1
        if len(part) * int(lengths[part].max()) > budget:
            return False
    return bool((seen == 1).all())


def _grouped(lengths: Lengths, rows: int) -> Iterator[Lengths]:
    """Mega-batches of transformers: 50 batches sorted together, rows as many as the mean length allows."""
    sampler = extra("transformers.trainer_pt_utils").LengthGroupedSampler
    import torch

    order = np.fromiter(sampler(rows, lengths=lengths.tolist(), generator=torch.Generator().manual_seed(0)), np.int64)
    return (lengths[order[at : at + rows]] for at in range(0, len(order), rows))


def _random(lengths: Lengths, rows: int, ranks: int) -> Iterator[Lengths]:
    order = np.random.default_rng(9).permutation(len(lengths))
    step = rows * ranks
    return (lengths[order[at : at + step]] for at in range(0, len(order) - step + 1, step))


def _random_loads(lengths: Lengths, ranks: int, rows: int) -> NDArray[np.float64]:
    """Padded tokens of each rank with random batches of ``rows`` examples a rank."""
    return np.array([_dealt(part, ranks) for part in _random(lengths, rows, ranks)])


def _grouped_loads(lengths: Lengths, ranks: int, rows: int) -> NDArray[np.float64]:
    """The same with mega-batches of transformers' kind, dealt to ranks in turn as its distributed sampler does."""
    order, found = np.random.default_rng(9).permutation(len(lengths)), []
    mega = 50 * rows
    for at in range(0, len(order) - mega + 1, mega):
        part = order[at : at + mega]
        order[at : at + mega] = part[np.argsort(-lengths[part], kind="stable")]
    for at in range(0, len(order) - rows * ranks + 1, rows * ranks):
        found.append(_dealt(lengths[order[at : at + rows * ranks]], ranks))
    return np.array(found)


def _dealt(part: Lengths, ranks: int) -> Lengths:
    dealt = part.reshape(-1, ranks)
    return dealt.max(axis=0) * len(dealt)


def _permuted(size: int) -> float:
    import torch

    return _seconds(lambda: torch.randperm(size))


def _seconds(call: Callable[[], object]) -> float:
    """The median of some calls."""
    found = []
    for _ in range(9):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def _row(
    case: str,
    sizes: Mapping[str, Any],
    unit: str,
    ours: float | list[float],
    name: str,
    theirs: float | list[float],
    goal: Goal | None,
    right: bool,
    place: Mapping[str, Any],
) -> Row:
    mine, other = (summary(value if isinstance(value, list) else [value]) for value in (ours, theirs))
    return Row("batches", case, sizes, 1, unit, mine, {"name": name, **other}, goal, checked=right, about=place)
