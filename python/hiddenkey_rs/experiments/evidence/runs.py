"""Tables of how results come about: what runs cost, the points of curves, and the commands that make them again."""

from __future__ import annotations

from statistics import median
from typing import Any

from ..statistics import Interval, mean_interval
from ..sweep.plan import CURVE, FINAL, SEARCH
from .measures import Measure, values
from .render import NONE, Table
from .studies import Found, Study

_PEAKS = {
    "device": "what torch had allocated on the GPU in training",
    "training": "that of the process in training, which keeps what libraries cached in its earlier trials: an upper bound",
    "process": "that of the process, which runs several trials one after the other: an upper bound",
}
"""What a line's ``peak_of`` means; the old ones without are of the process."""


def costs(study: Study) -> Table:
    """Time and memory of every method on every task."""
    rows, peaks = [], set[str]()
    for task in study.plan.tasks:
        held = {method: _timed(study, task, method) for method in study.plan.methods}
        first = (*study.plan.baselines, *study.plan.methods)[0]
        base = _median(held[first], "seconds_per_step")
        for method, runs in held.items():
            step = _median(runs, "seconds_per_step")
            peaks |= {item.line.peak_of or "process" for item in runs if item.line.peak_rss_mb}
            peak = max((item.line.peak_rss_mb or 0.0 for item in runs), default=0.0)
            rows.append(
                (
                    task,
                    method,
                    NONE if step is None else f"{step:.4g}",
                    NONE if step is None or not base else f"{step / base:.2f}",
                    _number(_median(runs, "examples_per_second"), ".0f"),
                    f"{peak:.0f}" if peak else NONE,
                    _number(_median(runs, "seconds"), ".0f"),
                    str(len(runs)),
                )
            )
    columns = ("task", "method", "seconds a step", f"times {first}", "examples/s", "peak MB", "seconds a run", "runs")
    memory = ", or ".join(text for kind, text in _PEAKS.items() if kind in peaks)
    caption = (
        "Medians over runs (final ones, else those of the search), evaluation left out of a step. Peak memory is "
        f"{memory or 'not known'}. Runs that shared a machine disturbed each "
        "other's times."
    )
    return Table("costs", "Cost", caption, columns, tuple(rows))


def _timed(study: Study, task: str, method: str) -> list[Found]:
    finals = [item for item in study.finals(task, method) if item.done]
    return finals or [i for i in study.stage(SEARCH) if i.done and (i.line.task, i.line.method) == (task, method)]


def _median(runs: list[Found], name: str) -> float | None:
    held = [float(value) for item in runs if (value := getattr(item.line, name)) is not None]
    return median(held) if held else None


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def curve_points(study: Study, key: str) -> list[dict[str, Any]]:
    """One entry a (task, method, value) of a curve: ``runs``, and of the metric and the last loss an interval."""
    curve, found = study.plan.curves[key], []
    for task in curve.tasks:
        metric, loss = Measure(study.plan.task_of(task).metric), Measure("loss", "last")
        for method in curve.methods:
            for value in curve.values:
                held = study.along(key, task, method, value)
                entry: dict[str, Any] = {"task": task, "method": method, "value": value, "runs": 0}
                for name, measure in (("metric", metric), ("loss", loss)):
                    figures = list(values(measure, held).values())
                    entry[name] = _band(figures) if figures else None
                    entry["runs"] = len(figures)
                found.append(entry)
    return found


def _band(figures: list[float]) -> Interval:
    """Student's interval; of fewer than three runs, of which it says nothing, what they reach."""
    if len(figures) > 2:
        return mean_interval(figures)
    return Interval(sum(figures) / len(figures), min(figures), max(figures))


def curve_table(study: Study, key: str) -> Table:
    """A curve's points as numbers."""
    curve = study.plan.curves[key]
    rows = []
    for point in curve_points(study, key):
        metric, loss = Measure(study.plan.task_of(point["task"]).metric), Measure("loss", "last")
        figures = [NONE if f is None else m.interval(f) for m, f in ((metric, point["metric"]), (loss, point["loss"]))]
        rows.append(
            (point["task"], point["method"], f"{point['value']}", *figures, f"{point['runs']}/{len(curve.seeds)}")
        )
    columns = ("task", "method", curve.vary, "metric, chosen epoch", "loss, last epoch", "runs")
    caption = (
        "Mean ± half of the 95 % interval over seeds (of fewer than three runs: of their range); everything but the value "
        "varied is as the search chose it."
    )
    return Table(f"curve-{key}", f"Curve {key}: the numbers", caption, columns, tuple(rows), folded=True)


def cell_commands(study: Study) -> Table:
    """Of every cell of the tables its seeds, and the command of its first run."""
    rows = []
    for task in study.plan.tasks:
        for method in study.plan.methods:
            runs = study.finals(task, method) or _timed(study, task, method)
            if runs:
                seeds = ", ".join(str(item.line.seed) for item in runs)
                rows.append((f"{task}: {method}", runs[0].line.command or NONE, f"{runs[0].line.stage}: {seeds}"))
    caption = (
        "The command of each cell's first run; the other seeds differ in the id. Finals and curves need the lines of their "
        "search in the same folder. Without --only the command runs all of the plan."
    )
    return Table("commands", "Commands", caption, ("cell", "command", "stage: seeds"), tuple(rows))


def run_commands(study: Study) -> Table:
    """Of every run its command."""
    order = {SEARCH: 1, FINAL: 0, CURVE: 2}
    items = sorted(study.found.values(), key=lambda item: (order[item.line.stage], item.line.id))
    rows = tuple(
        (item.line.id, item.line.command or NONE, item.line.status, item.line.commit or NONE) for item in items
    )
    caption = "Every run's command, commit and end; final runs first."
    return Table("every-run", "Every run", caption, ("trial", "command", "status", "commit"), rows, folded=True)
