"""The family of comparisons that the plan fixed beforehand, tested seed by seed, and what comes out in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ...errors import DataError
from ..statistics import (
    Interval,
    Resampled,
    bootstrap,
    constant,
    detectable,
    effect_size,
    holm,
    mean_interval,
    seeds_needed,
    sign_flip,
)
from ..tasks import Task
from .measures import Array, Measure, values
from .studies import Study

ALPHA = 0.05
_ROUNDED = 1e-6  # of a difference of two figures, which lines hold to six digits
BETTER, WORSE, OPEN, UNFINISHED = "better", "worse", "no difference shown", "unfinished"
DIVERGED = "diverged"
"""All runs are in, and so many diverged that there is nothing to test."""
WITHHELD = "withheld: diverged"
"""The side that is ahead diverged on some seeds, so that its lead is that of the seeds it survived."""


@dataclass(frozen=True)
class Comparison:
    """A method against a baseline on one task, by the difference method - baseline of every seed that both have.

    ``planned``: pairs that the plan has; ``settled``: those in which both runs have the figure or diverged; ``seeds``: those
    in which both have it. Until all are settled there is no ``p``: a test that is looked at while runs come in is no test,
    and a run that crashed is tried again. ``diverged``: planned runs of (the method, the baseline) that diverged.
    ``corrected``: Holm's over the family. ``needed``: seeds for power .8 at the effect seen, at alpha .05 and at alpha
    divided by the family's size. ``detectable``: the true differences that these seeds find with power .8 at either.
    """

    task: str
    method: str
    baseline: str
    measure: Measure
    planned: int
    settled: int
    seeds: tuple[int, ...]
    diverged: tuple[int, int] = (0, 0)
    difference: Interval | None = None
    effect: Interval | None = None
    p: float | None = None
    corrected: float | None = None
    resampled: Resampled | None = None
    with_rows: bool = False
    needed: tuple[int | None, int | None] = (None, None)
    detectable: tuple[float, float] | None = None

    @property
    def gain(self) -> float:
        """The difference, turned so that above 0 is better; 0 without one."""
        if self.difference is None:
            return 0.0
        return -self.difference.estimate if self.measure.lower_is_better else self.difference.estimate

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` with corrected p < .05, or one of the words above."""
        if self.p is None:
            lost = self.settled == self.planned and len(self.seeds) < 2 and any(self.diverged)
            return DIVERGED if lost else UNFINISHED
        if self.corrected is None or self.corrected >= ALPHA:
            return OPEN
        if self.diverged[0 if self.gain > 0 else 1]:
            return WITHHELD
        return BETTER if self.gain > 0 else WORSE


def family(study: Study, measure: Callable[[Task], Measure | None]) -> list[Comparison]:
    """Every comparison of the plan on one measure, corrected together. Tasks for which ``measure`` has none are left out."""
    found = []
    for key in study.plan.tasks:
        wanted = measure(study.plan.task_of(key))
        if wanted is not None:
            found += [(key, method, baseline, wanted) for method, baseline in study.plan.comparisons]
    raw = [compare(study, *entry, size=len(found)) for entry in found]
    corrected = holm([entry.p for entry in raw])
    return [replace(entry, corrected=p) for entry, p in zip(raw, corrected, strict=True)]


def compare(study: Study, task: str, method: str, baseline: str, measure: Measure, size: int = 1) -> Comparison:
    """One comparison, tested if all its runs have come in, uncorrected. ``size``: of the family, for :attr:`needed`."""
    found, differences = paired(study, task, method, baseline, measure)
    whole = found.settled == found.planned and not {(task, method), (task, baseline)} & study.provisional
    if not whole or len(differences) < 2:
        return found
    rows = _rows(study, found)
    effect = float("nan") if constant(differences) else abs(differences.mean()) / differences.std(ddof=1)
    return replace(
        found,
        effect=effect_size(differences),
        p=sign_flip(differences, rounded=_ROUNDED),
        resampled=bootstrap(differences if rows is None else rows),
        with_rows=rows is not None,
        needed=(seeds_needed(effect), seeds_needed(effect, alpha=ALPHA / size)),
        detectable=(detectable(differences), detectable(differences, alpha=ALPHA / size)),
    )


def paired(
    study: Study, task: str, method: str, baseline: str, measure: Measure, against: Measure | None = None
) -> tuple[Comparison, Array]:
    """The pairs of two methods so far, and their differences (pairs,); nothing is tested.

    ``against``: what is read off the baseline's runs, if not ``measure`` (the same figure at another epoch).
    """
    ours, theirs = study.finals(task, method), study.finals(task, baseline)
    planned = min(study.seeds(method), study.seeds(baseline), key=len)
    left, right = values(measure, ours), values(against or measure, theirs)
    lost = [{i.line.seed for i in items if i.diverged} & set(planned) for items in (ours, theirs)]
    settled = (left.keys() | lost[0]) & (right.keys() | lost[1]) & set(planned)
    seeds = tuple(seed for seed in planned if seed in left and seed in right)
    differences = np.array([left[seed] - right[seed] for seed in seeds])
    interval = mean_interval(differences) if seeds else None
    counts = len(lost[0]), len(lost[1])
    return Comparison(task, method, baseline, measure, len(planned), len(settled), seeds, counts, interval), differences


def _rows(study: Study, comparison: Comparison) -> Array | None:
    """(seeds, rows) differences, where the measure is a mean over rows."""
    task = study.plan.task_of(comparison.task)
    tables = []
    for method in (comparison.method, comparison.baseline):
        runs = {item.line.seed: item for item in study.finals(comparison.task, method)}
        rows = [comparison.measure.rows(runs[seed], task) for seed in comparison.seeds]
        kept = [row for row in rows if row is not None]
        if len(kept) < len(rows):
            return None
        if len({len(row) for row in kept}) > 1:
            places = (
                f"{[len(row) for row in kept]} rows of {comparison.task}/{method}, {runs[comparison.seeds[0]].place}"
            )
            raise DataError(f"runs were reported on different rows (got {places}); run them on the same data")
        tables.append(np.stack(kept))
    if tables[0].shape != tables[1].shape:
        shapes = f"{tables[0].shape[1]} and {tables[1].shape[1]} of {comparison.task}"
        raise DataError(f"methods were reported on different rows (got {shapes}); run them on the same data")
    return tables[0] - tables[1]


def outcome(study: Study, found: list[Comparison]) -> list[str]:
    """What the family says, in sentences that claim no more than its corrected p-values; the first is the outcome.

    ``found``: the family that the plan is about, of :func:`family`.
    """
    if not found:
        return [f"{study.name}: the plan fixed no family of comparisons, so nothing is tested here."]
    tested = [entry for entry in found if entry.verdict != UNFINISHED]
    lacking = f"{len(found) - len(tested)} of {len(found)} comparisons lack runs"
    if not tested:
        return [f"{study.name}: nothing can be said yet, {lacking}."]
    said = "; ".join(_said(method, found) for method in dict.fromkeys(entry.method for entry in found))
    rest = f"; {lacking}" if len(tested) < len(found) else ""
    how = (
        f"Measured by {_and(list(dict.fromkeys(entry.measure.name for entry in found)))} at the chosen epoch; better and worse "
        f"mean p < .05 of paired sign flips after Holm's correction over {_count(len(found), 'comparison')}."
    )
    return [
        sentence for sentence in (f"{study.name}: {said}{rest}.", how, _too_few(found), _left_out(tested)) if sentence
    ]


def _said(method: str, found: list[Comparison]) -> str:
    own = [entry for entry in found if entry.method == method]
    tasks = len(dict.fromkeys(entry.task for entry in own))
    baselines = list(dict.fromkeys(entry.baseline for entry in own))
    wins = {name: sum(e.verdict == BETTER for e in own if e.baseline == name) for name in baselines}
    losses = {name: sum(e.verdict == WORSE for e in own if e.baseline == name) for name in baselines}
    everywhere = _count(tasks, "task")
    if not any(wins.values()):
        names = _and([f"'{name}'" for name in baselines], "or")
        text = f"'{method}' is not shown to be better than {names} on any of {everywhere}"
    else:
        text = f"'{method}' is better than " + _and([f"'{name}' on {wins[name]} of {everywhere}" for name in baselines])
        if len(baselines) > 1:
            won = [
                {e.verdict for e in own if e.task == task} == {BETTER} for task in dict.fromkeys(e.task for e in own)
            ]
            text += f", than {'both' if len(baselines) == 2 else 'all of them'} on {sum(won)}"
    worse = [f"'{name}' on {count}" for name, count in losses.items() if count]
    return text + (f", and worse than {_and(worse)}" if worse else "")


def _too_few(found: list[Comparison]) -> str:
    """That a family could not have shown anything: were every p the smallest of its seeds, Holm's would not be below .05."""
    best = holm([2.0 ** (1 - entry.planned) for entry in found])
    short = [entry for entry, p in zip(found, best, strict=True) if p is None or p >= ALPHA]
    if not short:
        return ""
    seeds = _and(list(dict.fromkeys(str(entry.planned) for entry in short)))
    which = "No" if len(short) == len(found) else f"{len(short)} of the"
    verb = "comparison can" if which == "No" else "comparisons cannot"
    return f"{which} {verb} reach that p with the {seeds} seeds planned, whatever the differences are."


def _left_out(tested: list[Comparison]) -> str:
    """A method that diverges loses its worst seeds: that must be said where it is compared."""
    short = [
        f"{e.planned - len(e.seeds)} of {e.method} − {e.baseline} on {e.task}"
        for e in tested
        if len(e.seeds) < e.planned
    ]
    if not short:
        return ""
    said = f"Pairs of which a run diverged are left out: {', '.join(short)}."
    withheld = [f"{e.method} − {e.baseline} on {e.task}" for e in tested if e.verdict == WITHHELD]
    if withheld:
        said += f" No verdict where the side that is ahead diverged, however small p is: {', '.join(withheld)}."
    return said


def losses(study: Study, found: list[Comparison]) -> str:
    """How the last loss compares, in a sentence; empty without a finished comparison. ``found``: the family on that loss."""
    said = []
    for method, baseline in dict.fromkeys((entry.method, entry.baseline) for entry in found):
        own = [e for e in found if (e.method, e.baseline) == (method, baseline) and e.p is not None]
        if own:
            lower, sure = sum(entry.gain > 0 for entry in own), sum(entry.verdict == BETTER for entry in own)
            against = sum(entry.verdict == WORSE for entry in own)
            of = f"{lower} of {_count(len(own), 'task')}"
            said.append(
                f"'{method}' ends lower than '{baseline}' on {of} (corrected p < .05 on {sure}, and higher on {against})"
            )
    return f"{study.name}, loss of the reported rows at the last epoch: {'; '.join(said)}." if said else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _and(words: list[str], word: str = "and") -> str:
    return f" {word} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 2 else words)
