"""``hiddenkey bench attention``: attention with dropped keys, forward and backward, against attention without dropout.

Each length and rate is one case, whose paths (``attention_paths``) take turns. Every path's output and gradients are
compared with the reference before it is timed; masks are drawn anew, and keys gathered, within the time.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import attention_tables, devices, harness
from .attention_paths import (
    BLOCKED,
    BOOLEAN,
    DENSE,
    DROPOUT,
    FLASH,
    GATHERED,
    KEPT,
    KERNEL,
    LAYERS,
    PATHS,
    PLAIN,
    Layout,
    Result,
    Work,
)
from .harness import Case, Entrant, Goal, Pair, Row

_STEPS = 5 * LAYERS
"""Masks of so many steps are drawn in turn: kept counts vary as they do in training."""
_MOST_PAIRS = 1 << 31
"""A dense mask of more query-key pairs is left out: its float copy alone would take 8 GB."""
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Of the largest number: products are summed in another order, and in 16-bit types weights are rounded (2**-8) first."""
# Times of undropped SDPA, by (device, least length): (rate .1, rate .3). On the CPU they are about bidirectional attention.
_GOALS = {
    "cpu": ((2048, 4096, (0.90, 0.75)), (512, 512, (0.93, 0.80))),
    "cuda": ((8192, 1 << 20, (0.95, 0.80)), (2048, 4096, (1.00, 0.85))),
}
_ELEMENT_GOALS = {FLASH: 1.30, DROPOUT: 1.05}


@dataclass(frozen=True)
class Series:
    """One layout over lengths and rates. ``ours`` and ``peers`` name paths; the first peer carries the goal."""

    layout: Layout
    lengths: tuple[int, ...]
    rates: tuple[float, ...]
    ours: str
    peers: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """How much is attended to. ``tokens``: of a batch, about; batches get smaller as sequences get longer."""

    tokens: int
    series: tuple[Series, ...]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    goals: bool = True
    budget: float = 0.6
    """Seconds of a case to spend on samples beyond the least number."""


_CPU_PEERS = (PLAIN, BOOLEAN, DROPOUT, DENSE)
_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
_RATES = (0.1, 0.2, 0.3)
_GROUPED = Layout(heads=16, groups=4)
WHOLE = Sizes(
    4096,
    (
        Series(Layout(), _LENGTHS, _RATES, GATHERED, _CPU_PEERS),
        Series(Layout(pattern="span"), (512, 2048), (0.1, 0.3), GATHERED, (PLAIN, BOOLEAN)),
        Series(_GROUPED, (512, 2048), (0.1, 0.3), GATHERED, (PLAIN, BOOLEAN)),
        Series(Layout(causal=True), (512, 2048, 4096), (0.1, 0.3), BLOCKED, (PLAIN, DROPOUT, DENSE)),
    ),
)
QUICK = Sizes(4096, (Series(Layout(), (128, 512), (0.1, 0.3), GATHERED, _CPU_PEERS),))
_CUDA_PEERS = (FLASH, PLAIN, KERNEL, DROPOUT, BOOLEAN, DENSE)
_WIDE = Layout(heads=16, groups=16, features=128)
CUDA = Sizes(
    65536,
    (
        # Kept keys alone against every key masked: what triton_gather.GATHER_DROPPED is to be set by.
        Series(Layout(), (*_LENGTHS, 8192), _RATES, KEPT, _CUDA_PEERS),
        Series(Layout(causal=True), (512, 2048, 4096, 8192), (0.1, 0.3), KEPT, (FLASH, PLAIN, KERNEL, DROPOUT)),
        Series(Layout(32, 8, 128, causal=True), (2048, 8192), (0.1, 0.3), KEPT, (FLASH, PLAIN, KERNEL)),
        Series(Layout(pattern="span"), (2048,), (0.1, 0.3), KEPT, (FLASH, PLAIN, KERNEL)),
        *(
            Series(
                replace(_WIDE, pattern="element", position=position, causal=causal),
                (512, 2048, 4096),
                (0.1,),
                KERNEL,
                (FLASH, DROPOUT, PLAIN),
            )
            for position in ("dropkey", "dropattention")
            for causal in (False, True)
        ),
    ),
    device="cuda",
    dtype=torch.bfloat16,
)


def adapted(options: argparse.Namespace) -> Sizes:
    """The sizes that the command line asks for. Raises ConfigError: no such device here."""
    device = devices.check(options.device)
    if device == "cpu":
        return QUICK if options.quick else WHOLE
    return quick_cuda() if options.quick else CUDA


def quick_cuda() -> Sizes:
    """Two lengths of every layout, one rate less."""
    series = []
    for one in CUDA.series:
        lengths = tuple(length for length in one.lengths if length in (512, 2048))
        series.append(replace(one, lengths=lengths, rates=tuple(r for r in one.rates if r != 0.2)))
    return replace(CUDA, series=tuple(series))


def run(sizes: Sizes, threads: Sequence[int], place: Mapping[str, Any]) -> Iterator[Row]:
    """Every row; ``threads``: how many to try, on a CPU."""
    place = devices.place(place, sizes.device)
    for count in threads:
        rows = []
        for row in harness.run(cases(sizes, count), place):
            rows.append(row)
            yield row
        yield from growth(rows, place)


def cases(sizes: Sizes, threads: int) -> Iterator[Case]:
    """All cases, made one after another so that only one holds memory."""
    for series in sizes.series:
        for length in series.lengths:
            work = Work(series.layout, max(1, sizes.tokens // length), length, sizes.dtype, sizes.device)
            for rate in series.rates:
                yield _case(sizes, series, work, rate, threads)


def _case(sizes: Sizes, series: Series, work: Work, rate: float, threads: int) -> Case:
    layout, length = series.layout, work.length
    peers = [name for name in series.peers if name not in (DENSE, BOOLEAN) or _fits(name, work)]
    expected: dict[float, Result] = {}
    entrants = [_entrant(name, work, rate, expected) for name in (series.ours, *peers)]
    goals = _goals(sizes, series, length, rate)
    pairs = [
        Pair(layout.name, series.ours, peer, goals.get(peer), first=number == 0) for number, peer in enumerate(peers)
    ]
    if BOOLEAN in peers:
        pairs.append(Pair(f"{layout.name}, not gathered", BOOLEAN, peers[0], first=False))
    about = {
        "length": length,
        "batch": work.batch,
        "heads": layout.heads,
        "kv_heads": layout.groups,
        "head_size": layout.features,
        "rate": rate,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "impl": series.ours,
    }
    return Case("attention", about, "ms", 1e3, threads, entrants, pairs, sizes.budget)


def _fits(name: str, work: Work) -> bool:
    rows = 1 if name == BOOLEAN and not work.layout.causal and work.device == "cpu" else work.length
    return work.batch * work.layout.heads * rows * work.length <= _MOST_PAIRS


def _goals(sizes: Sizes, series: Series, length: int, rate: float) -> dict[str, Goal]:
    """Peer -> what a row must reach against it."""
    if not sizes.goals or (sizes.device == "cpu" and series.layout.causal):
        return {}
    if series.layout.pattern == "element":
        ratios = _ELEMENT_GOALS if length >= 2048 and series.layout.features == 128 else {}
        return {peer: Goal("speedup", 1 / ratio) for peer, ratio in ratios.items()}
    for least, most, (low, high) in _GOALS[sizes.device]:
        if least <= length <= most and rate in (0.1, 0.3):
            return {series.peers[0]: Goal("speedup", 1 / (low if rate == 0.1 else high))}
    return {}


def _entrant(name: str, work: Work, rate: float, expected: dict[float, Result]) -> Entrant:
    steps = itertools.cycle(range(_STEPS))
    path = PATHS[name]

    def call() -> None:
        path(work, rate, next(steps))

    def check() -> bool:
        if name == DROPOUT:
            return _drops_at(work, rate)
        if name in (PLAIN, FLASH):
            return _agree(path(work, rate, 0), work.undropped, work)
        if rate not in expected:
            expected[rate] = work.reference(rate, 0)
        gone = name == DENSE or _dropped_are_gone(path, work, rate)  # torch's own may leave traces
        return gone and _agree(path(work, rate, 0), expected[rate], work)

    after = None if work.device == "cpu" else partial(devices.wait, work.device)
    return Entrant(name, call, check, after=after)


def _agree(found: Result, expected: Result, work: Work) -> bool:
    """Output and gradients, each to a tolerance of its largest number."""
    tolerance = _TOLERANCES[work.query.dtype]
    return all(
        one.shape == other.shape and bool((one.float() - other).abs().max() <= tolerance * other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


def _dropped_are_gone(path: Any, work: Work, rate: float) -> bool:
    """No gradient reaches a key or value that every head of its group dropped, not even a small one."""
    if work.layout.pattern == "element" or work.layout.position != "dropkey" or work.layout.causal:
        return True
    keep = work.keep(rate, 1)
    lost = ~keep & keep.any(dim=-1, keepdim=True)
    _, _, key, value = path(work, rate, 1)
    return not bool(key[lost].any()) and not bool(value[lost].any())


def _drops_at(work: Work, rate: float) -> bool:
    """SDPA's own dropout keeps sums of weights at 1 on average, and not each of them."""
    ones = Work.__new__(Work)
    ones.__dict__ = {**work.__dict__, "value": torch.ones_like(work.value).requires_grad_()}
    sums: Tensor = PATHS[DROPOUT](ones, rate, 0)[0].float()[..., 0]
    error = 6 * (rate / (1 - rate) / sums.numel()) ** 0.5 + 0.004  # flash quantises its rate to 8 bits
    # Squares of n weights add up to 1 / n at least, so sums that drop spread at least so much.
    spread = (rate / (1 - rate) / work.length) ** 0.5
    return abs(float(sums.mean()) - 1) <= error and float(sums.std()) > 0.5 * spread


def growth(rows: Sequence[Row], place: Mapping[str, Any]) -> Iterator[Row]:
    """How much longer the longest sequences take than those of an eighth, for the same tokens: no worse than SDPA's."""
    mine = [row for row in rows if row.first and row.checked and row.sizes["kv_heads"] == row.sizes["heads"]]
    mine = [row for row in mine if row.case == "column DropKey"]
    longest = max((row.sizes["length"] for row in mine), default=0)
    for row in mine:
        short = [r for r in mine if r.sizes == {**row.sizes, "length": longest // 8, "batch": row.sizes["batch"] * 8}]
        if row.sizes["length"] != longest or not short:
            continue
        before = short[0]
        yield Row(
            "attention",
            f"growth from L {longest // 8}",
            row.sizes,
            row.threads,
            "times",
            attention_tables.ratio(row.ours, before.ours),
            {"name": row.peer["name"], **attention_tables.ratio(row.peer, before.peer)},
            Goal("speedup", 1 / 1.1),  # a tenth is what two medians on a shared machine may differ by
            about=place,
        )


def tables(rows: Sequence[Row]) -> list[list[dict[str, str]]]:
    """What the terminal shows: rows with goals, then milliseconds, and times of SDPA, by length."""
    return attention_tables.tables(rows)


def notes(rows: Sequence[Row]) -> list[str]:
    """Where gathering begins to pay."""
    return attention_tables.crossovers(rows)


def plot(rows: Sequence[Row], path: str) -> None:
    """The picture of ``--plot``."""
    attention_tables.plot(rows, path)
