"""The harness of every benchmark: check the result, warm up, time ours and its peers in turn, report what came out.

A :class:`Case` names calls (:class:`Entrant`) and what to compare (:class:`Pair`). Entrants take turns within one
process, so that whatever else the machine does meets all of them. A row whose results were not found right is not timed.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import masks
from ..errors import StateError
from . import machine

SAMPLES = 7
"""Every median is one of at least so many samples, those of slow bystanders excepted."""
SLOW, SLOW_SAMPLES = 0.1, 3
"""A call of more seconds than this is sampled fewer times, unless a goal or a first comparison hangs on it."""
_SAMPLE_SECONDS = 0.5e-3  # a shorter call is repeated within a sample: the clock itself costs some 50 ns
_DEVICE_SECONDS = 10e-3  # of a sample that ends by waiting
_TURN_SECONDS, _TURN_SAMPLES = 0.02, 5  # fast calls are sampled several times a turn
_MOST_ROUNDS = 25


@dataclass(frozen=True)
class Entrant:
    """One call that is timed.

    Attributes:
        name: as rows show it.
        call: takes nothing; its result is dropped.
        check: runs before timing; whether what ``call`` makes is right. Of a peer: whether it does the same work.
        before: runs before every sample, not timed.
        after: ends every sample, timed: waits for a device that works behind the calls. A sample is then of many of them, so
            that the host's own time hides where the device is what is waited for, as it does in training.
    """

    name: str
    call: Callable[[], object]
    check: Callable[[], bool]
    before: Callable[[], object] | None = None
    after: Callable[[], object] | None = None


@dataclass(frozen=True)
class Goal:
    """What a row must reach: a speedup of at least, or a median of at most, ``bound``.

    Example:
        >>> str(Goal("speedup", 50)), Goal("median", 2.0).met(median=1.7, speedup=None)
        ('speedup >= 50', True)
    """

    measure: str
    bound: float

    def __str__(self) -> str:
        return f"{self.measure} {'>=' if self.measure == 'speedup' else '<='} {self.bound:.4g}"

    def met(self, median: float, speedup: float | None) -> bool:
        """Whether these figures, in the row's unit, reach it."""
        if self.measure == "speedup":
            return speedup is not None and speedup >= self.bound
        return median <= self.bound


@dataclass(frozen=True)
class Pair:
    """One row: two entrants of a case by name. ``first``: the row belongs into the short table."""

    case: str
    ours: str
    peer: str
    goal: Goal | None = None
    first: bool = True


@dataclass(frozen=True)
class Case:
    """Entrants that take turns, and the rows made of them.

    Attributes:
        sizes: what the work's size is, for the row.
        unit, per_second: what figures are in, and how many of these a second of one call is.
        threads: of ours and of torch, while this case runs.
        budget: seconds to spend on samples beyond the least number.
    """

    bench: str
    sizes: Mapping[str, Any]
    unit: str
    per_second: float
    threads: int
    entrants: Sequence[Entrant]
    pairs: Sequence[Pair]
    budget: float = 0.6


@dataclass(frozen=True)
class Row:
    """One comparison, as a line of JSON. Figures are None where a check failed."""

    bench: str
    case: str
    sizes: Mapping[str, Any]
    threads: int
    unit: str
    ours: Mapping[str, Any]
    peer: Mapping[str, Any]
    goal: Goal | None = None
    checked: bool = True
    first: bool = True
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """The peer's median divided by ours."""
        ours, peer = self.ours["median"], self.peer["median"]
        return peer / ours if self.checked and ours and peer is not None else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.checked and self.goal.met(self.ours["median"], self.speedup)

    def to_dict(self) -> dict[str, Any]:
        """The row's JSON object."""
        return {
            "bench": self.bench,
            "case": self.case,
            "sizes": dict(self.sizes),
            "threads": self.threads,
            "device": self.about.get("device"),
            "simd": self.about.get("simd"),
            "unit": self.unit,
            "ours": dict(self.ours),
            "peer": dict(self.peer),
            "speedup": self.speedup,
            "goal": None if self.goal is None else str(self.goal),
            "met": self.met,
            "checked": self.checked,
            "versions": self.about.get("versions"),
            "cpu": self.about.get("cpu"),
            "commit": self.about.get("commit"),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any], first: bool = True) -> Row:
        """The row of :meth:`to_dict`; ``first`` is not in there, and a goal has four digits.

        Example:
            >>> row = Row("b", "c", {}, 1, "ms", {"median": 1.0}, {"name": "p", "median": 2.0}, Goal("speedup", 1.5))
            >>> Row.from_dict(row.to_dict()).met
            True
        """
        goal = values["goal"] and Goal(values["goal"].split()[0], float(values["goal"].split()[-1]))
        about = {name: values[name] for name in ("device", "simd", "versions", "cpu", "commit")}
        same = {name: values[name] for name in ("bench", "case", "sizes", "threads", "unit", "ours", "peer", "checked")}
        return Row(**same, goal=goal or None, first=first, about=about)

    def cells(self) -> dict[str, str]:
        """The row in a table's columns."""
        met = {None: "", True: "yes", False: "NO"}[self.met] if self.checked else "UNCHECKED"
        return {
            "case": self.case,
            "size": short(self.sizes),
            "threads": str(self.threads),
            "unit": self.unit,
            "ours": figure(self.ours["median"]),
            "p10-p90": f"{figure(self.ours['p10'])}-{figure(self.ours['p90'])}",
            "peer": str(self.peer["name"]),
            "peer's": figure(self.peer["median"]),
            "speedup": "-" if self.speedup is None else f"{figure(self.speedup)}x",
            "goal": "" if self.goal is None else str(self.goal),
            "met": met,
        }


def about() -> dict[str, Any]:
    """What every row of a run says about the place it was measured in.

    Raises:
        StateError: the extension is a debug build.
    """
    engine = masks.engine()
    if engine["build"] != "release":
        raise StateError(
            f"only a release build is worth timing (got a {engine['build']} build); install with "
            "`pip install .` or `maturin develop --release`"
        )
    return {
        "device": "cpu",
        "simd": engine["simd"],
        "versions": machine.versions(),
        "cpu": machine.processor(),
        "commit": machine.commit(),
    }


def run(cases: Iterable[Case], place: Mapping[str, Any]) -> Iterator[Row]:
    """Check and time every case; progress goes to standard error. ``place``: :func:`about`."""
    for case in cases:
        _say(f"{case.bench}: {case.pairs[0].case} {short(case.sizes)}, {case.threads} thread(s)")
        with machine.using_threads(case.threads):
            right = {entrant.name for entrant in case.entrants if _passes(entrant)}
            # The first row's peer, and whatever a goal is measured against, is sampled in full even if it is slow.
            needed = {pair.peer for pair in case.pairs if pair.first or pair.goal} | {p.ours for p in case.pairs}
            timed = [entrant for entrant in case.entrants if entrant.name in right]
            samples = measure(timed, needed, case.budget)
        for pair in case.pairs:
            ours, peer = (summary(samples.get(name, []), case.per_second) for name in (pair.ours, pair.peer))
            yield Row(
                case.bench,
                pair.case,
                case.sizes,
                case.threads,
                case.unit,
                ours,
                {"name": pair.peer, **peer},
                pair.goal,
                checked={pair.ours, pair.peer} <= right,
                first=pair.first,
                about=place,
            )


def measure(entrants: Sequence[Entrant], needed: set[str], budget: float) -> dict[str, list[float]]:
    """Seconds a call, name -> samples. Entrants alternate; those not ``needed`` and slow are sampled fewer times."""
    repeats, least, quick = {}, {}, set()
    for entrant in entrants:
        seconds = _warm(entrant)
        least_seconds = _SAMPLE_SECONDS if entrant.after is None else _DEVICE_SECONDS
        repeats[entrant.name] = max(1, math.ceil(least_seconds / max(seconds, 1e-8)))
        quick |= {entrant.name} if seconds < _TURN_SECONDS else set()
        least[entrant.name] = SLOW_SAMPLES if seconds > SLOW and entrant.name not in needed else SAMPLES
    samples: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        for _ in range(_MOST_ROUNDS):
            active = entrants
            if time.perf_counter() > end:
                wanting = [entrant for entrant in entrants if len(samples[entrant.name]) < least[entrant.name]]
                if not wanting:
                    break
                # Fast ones go on with the slow, so that both saw the same minutes of the machine.
                active = [entrant for entrant in entrants if entrant in wanting or entrant.name in quick]
            for entrant in active:
                samples[entrant.name] += _turn(entrant, repeats[entrant.name])
    finally:
        if collecting:
            gc.enable()
    return samples


def summary(samples: Sequence[float], per_second: float = 1.0) -> dict[str, Any]:
    """``{"median", "p10", "p90", "n"}`` of samples in seconds, in another unit; None without samples.

    Example:
        >>> summary([1.0, 2.0, 3.0])["median"], summary([])["median"]
        (2.0, None)
    """
    if not samples:
        return {"median": None, "p10": None, "p90": None, "n": 0}
    low, middle, high = (float(value) * per_second for value in np.quantile(samples, [0.1, 0.5, 0.9]))
    return {"median": middle, "p10": low, "p90": high, "n": len(samples)}


def figure(value: float | None) -> str:
    """A number to three digits, without an exponent.

    Example:
        >>> figure(0.0812), figure(5.4321), figure(1234.5), figure(None)
        ('0.0812', '5.43', '1234', '-')
    """
    if value is None:
        return "-"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:.{min(max(digits, 0), 9)}f}"


def short(sizes: Mapping[str, Any]) -> str:
    """Sizes as a table shows them.

    Example:
        >>> short({"decisions": 65536}), short({"samples": 32, "heads": 16, "columns": 512})
        ('2^16', '32x16x512')
    """
    values = list(sizes.values())
    if len(values) == 1 and isinstance(values[0], int) and values[0] >= 1024 and values[0].bit_count() == 1:
        return f"2^{values[0].bit_length() - 1}"
    return "x".join(str(value) for value in values)


def _turn(entrant: Entrant, repeats: int) -> list[float]:
    """One sample, or a few of a fast call."""
    found: list[float] = []
    call, counts = entrant.call, range(repeats)
    begun = time.perf_counter()
    while len(found) < _TURN_SAMPLES:
        if entrant.before is not None:
            entrant.before()
        start = time.perf_counter()
        for _ in counts:
            call()
        if entrant.after is not None:
            entrant.after()
        stop = time.perf_counter()
        found.append((stop - start) / repeats)
        if stop - begun > _TURN_SECONDS:
            break
    return found


def _warm(entrant: Entrant) -> float:
    """Run the call until its memory is mapped and its code is hot; seconds of one call."""
    if entrant.before is not None:
        entrant.before()
    begun = time.perf_counter()
    best = math.inf
    for _ in range(50):
        start = time.perf_counter()
        entrant.call()
        if entrant.after is not None:
            entrant.after()
        stop = time.perf_counter()
        best = min(best, stop - start)
        if stop - begun > _TURN_SECONDS:
            break
    return best


def _passes(entrant: Entrant) -> bool:
    """Whether the entrant's check found its result right; what went wrong goes to standard error."""
    if entrant.before is not None:
        entrant.before()
    try:
        right = bool(entrant.check())
        reason = "its result differs from the reference"
    except Exception as error:  # whatever a call under test raises, the other rows still count
        right, reason = False, f"{type(error).__name__}: {error}"
    if not right:
        _say(f"check failed: {entrant.name}: {reason}")
    return right


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
