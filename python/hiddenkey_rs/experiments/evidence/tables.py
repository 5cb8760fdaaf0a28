"""Tables of what was run and what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import stdev

from ..statistics import mean_interval
from ..sweep.lines import per_example
from ..sweep.plan import CURVE, FINAL, SEARCH
from .comparisons import Comparison, paired
from .measures import Measure, measures, tested_on, values
from .render import NONE, Table
from .search import chosen_text
from .studies import Found, Study


def coverage(study: Study) -> Table:
    """Trials done of those planned, for every task and method, and what is missing."""
    stages = {"search": SEARCH, "final": FINAL, "curves": CURVE}
    rows = []
    for task in study.plan.tasks:
        for method in study.plan.methods:
            counts, lacking = [], []
            for name, stage in stages.items():
                planned = [cell for cell, _ in study.expected[stage] if cell == (task, method)]
                missing = [trial for cell, trial in study.missing[stage] if cell == (task, method)]
                counts.append(f"{len(planned) - len(missing)}/{len(planned)}" if planned else NONE)
                lacking += [name] if missing else []
            failed = [item for item in study.failed() if (item.line.task, item.line.method) == (task, method)]
            notes = [f"missing: {', '.join(lacking)}"] if lacking else ["complete"]
            notes += ["setting provisional, its search is not finished"] if (task, method) in study.provisional else []
            notes += [_failure(item) for item in failed]
            rows.append((task, method, *counts, str(len(failed)), "; ".join(notes)))
    caption = (
        "Trials that have a result, of those planned. A trial that diverged has one; one that failed otherwise stays in the "
        "count of what is missing."
    )
    columns = ("task", "method", *stages, "failed", "state")
    return Table("coverage", "Trials", caption, columns, tuple(rows))


def _failure(item: Found) -> str:
    line = item.line
    return f"{line.id} failed: {line.error}" if not line.diverged else f"{line.id} diverged at step {line.step}"


def overview(study: Study, when: str = "chosen") -> Table:
    """Methods x tasks: the metric at the chosen epoch, or at the last."""
    rows, seeds = [], len(study.plan.protocol.final_seeds)
    for method in study.plan.methods:
        cells = []
        for task in study.plan.tasks:
            measure = Measure(study.plan.task_of(task).metric, when)
            cells.append(_mean(measure, values(measure, study.finals(task, method)), seeds))
        rows.append((method, *cells))
    heads = [f"{task}: {study.plan.task_of(task).metric}" for task in study.plan.tasks]
    if when == "last":
        caption = "As the table of scores, at the last epoch: what training without early stopping would have kept."
        return Table("overview-last", "Scores at the last epoch", caption, ("method", *heads), tuple(rows))
    caption = (
        "Mean over final seeds ± half of Student's 95 % interval, on the reported rows, at the epoch that the selection rows "
        "chose; in brackets the seeds where there are fewer than the plan's: such a mean is of other training subsets than the "
        "others, and tells nothing beside them. The interval tells how much runs differ; methods are compared by the paired "
        "differences below, over the seeds that both have, which are far more certain."
    )
    return Table("overview", "Scores", caption, ("method", *heads), tuple(rows))


def _mean(measure: Measure, found: Mapping[int, float], planned: int | None = None) -> str:
    if not found:
        return NONE
    text = measure.interval(mean_interval(list(found.values())))
    return text if planned is None or len(found) == planned else f"{text} ({len(found)} seeds)"


def detail(study: Study, task: str, family: list[Comparison]) -> Table:
    """One task: every method's figures, and its difference to every baseline."""
    kind = study.plan.task_of(task)
    metric = tested_on(study.plan, kind)
    shown, baselines = measures(kind), study.plan.baselines
    tested = {(entry.method, entry.baseline): entry for entry in family if entry.task == task}
    rows = []
    for method in study.plan.methods:
        runs = study.finals(task, method)
        cells = [_mean(measure, values(measure, runs)) for measure in shown]
        for baseline in baselines:
            cells.append(_against(study, task, method, baseline, metric, tested.get((method, baseline))))
        rows.append((method, chosen_text(study, task, method), str(sum(item.done for item in runs)), *cells))
    columns = ["method", "setting chosen", "seeds", *(measure.title for measure in shown)]
    columns += [f"difference to {baseline}" for baseline in baselines]
    caption = (
        "Means over final seeds ± half of the 95 % interval; scores and ECE in percent, losses per row. The gap is the loss "
        f"of the reported rows less that of the rows fitted on. Differences are of {metric.name} at the chosen epoch, paired "
        "by seed, with their 95 % interval; for the family fixed beforehand, and for nothing else, they have Holm's p, and the "
        "number of seeds that would find such a difference with power .8 (alpha .05)."
    )
    return Table(f"task-{task}", f"{task}: all figures", caption, tuple(columns), tuple(rows))


def _against(study: Study, task: str, method: str, baseline: str, metric: Measure, tested: Comparison | None) -> str:
    if method == baseline:
        return ""
    found = tested or paired(study, task, method, baseline, metric)[0]
    if found.difference is None:
        return NONE
    difference = metric.interval(found.difference, signed=True)
    if tested is None:
        return difference
    if tested.p is None:
        return f"{difference} unfinished"
    return f"{difference} p {p_text(tested.corrected)}; {seeds_text(tested)} seeds"


def tests(study: Study, key: str, title: str, caption: str, family: list[Comparison]) -> Table:
    """Every comparison of a family: difference, effect size, p-values, and what the seeds could have found."""
    rows = []
    for entry in family:
        measure = entry.measure
        size, drawn = entry.effect, entry.resampled
        sized = NONE if size is None or math.isnan(size.estimate) else _interval(size.estimate, size.low, size.high)
        resampled = NONE
        if drawn is not None:
            bounds = f"[{measure.write(drawn.low, True)}, {measure.write(drawn.high, True)}]"
            resampled = f"{p_text(drawn.p)} {bounds}{'' if entry.with_rows else ' seeds only'}"
        rows.append(
            (
                entry.task,
                f"{entry.method} − {entry.baseline}",
                entry.verdict,
                pairs_text(entry),
                NONE if entry.difference is None else measure.interval(entry.difference, signed=True),
                p_text(entry.p),
                p_text(entry.corrected),
                sized,
                resampled,
                seeds_text(entry, corrected=True),
                _detectable(entry),
            )
        )
    columns = (
        *("task", "difference", "verdict", "pairs", "mean [95 %]", "p", "p, Holm", "Hedges' g [95 %]"),
        *("bootstrap p [95 %]", "seeds for power .8", "detectable"),
    )
    return Table(key, title, caption, columns, tuple(rows))


def rows_of(study: Study) -> Table:
    """What each task's runs were fitted to and reported on."""
    rows = []
    for key in study.plan.tasks:
        done = [item for item in study.found.values() if item.done and item.line.task == key]
        fitted = sorted({item.line.train_size for item in done if item.line.train_size is not None})
        shown = sorted({len(per_example(item.line, "last")[1]) for item in done if "last" in item.line.examples})
        task = study.plan.task_of(key)
        cells = [", ".join(map(str, counts)) or NONE for counts in (fitted, shown)]
        rows.append((key, task.name, *cells, task.metric, "low" if task.lower_is_better else "high"))
    columns = ("task", "data set", "rows fitted on", "rows reported", "metric", "good is")
    return Table("rows", "Tasks", "", columns, tuple(rows))


def spread_text(measure: Measure, found: Mapping[int, float]) -> str:
    """``mean (standard deviation)``, as the paper prints its cells."""
    if not found:
        return NONE
    held = list(found.values())
    middle = measure.write(sum(held) / len(held))
    return f"{middle} ({measure.write(stdev(held))})" if len(held) > 1 else middle


def p_text(p: float | None) -> str:
    """A p-value to three digits.

    Example:
        >>> p_text(0.0312), p_text(0.00001), p_text(None)
        ('0.031', '<0.001', '–')
    """
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def pairs_text(entry: Comparison) -> str:
    """Pairs at hand, and where some are missing or diverged those planned."""
    return str(entry.planned) if len(entry.seeds) == entry.planned else f"{len(entry.seeds)} of {entry.planned}"


def seeds_text(entry: Comparison, corrected: bool = False) -> str:
    """Seeds for power .8 at the difference seen; with ``corrected``, in brackets those at the family's alpha."""
    if entry.detectable is None or math.isnan(entry.detectable[0]):  # all pairs alike: no number of seeds tells more
        return NONE
    plain, strict = ("∞" if needed is None else str(needed) for needed in entry.needed)
    return f"{plain} ({strict})" if corrected else plain


def _detectable(entry: Comparison) -> str:
    if entry.detectable is None:
        return NONE
    plain, strict = (entry.measure.write(value) if math.isfinite(value) else NONE for value in entry.detectable)
    return f"{plain} ({strict})"


def _interval(middle: float, low: float, high: float) -> str:
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
