"""What the search chose: by how much, at the edge of what was offered, and at which learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sweep.plan import SEARCH
from ..sweep.selection import search_scores
from ..tasks import Task
from .measures import Measure
from .render import NONE, Table
from .studies import Study

_RATE = "lr_scale"


def searched_rates(study: Study) -> str:
    """That only some methods searched learning rates, which the differences to the others hold as well; empty if all or none."""
    searched = [
        method
        for method, entry in study.plan.methods.items()
        if len({(setting.get("lr"), setting.get(_RATE, 1.0)) for setting in entry.settings}) > 1
    ]
    if len(searched) in (0, len(study.plan.methods)):
        return ""
    names = ", ".join(f"'{method}'" for method in searched)
    return (
        f"Only {names} searched {'its learning rate' if len(searched) == 1 else 'their learning rates'}: the other methods "
        "ran at the plan's."
    )


def unequal_rates(study: Study) -> str:
    """At which learning rates compared methods ran, where those differ; empty if they never do."""
    said = []
    for task in study.plan.tasks:
        rates = {
            method: study.plan.trial(SEARCH, task, method, study.settings[task, method], 0).config.lr
            for pair in study.plan.comparisons
            for method in pair
            if (task, method) in study.settings
        }
        if len(set(rates.values())) > 1:
            said.append(f"on {task} " + ", ".join(f"'{method}' at {rate:g}" for method, rate in rates.items()))
    if not said:
        return ""
    return (
        f"Compared methods ended at different learning rates: {'; '.join(said)}. There a difference between two is partly one "
        "of learning rates."
    )


def chosen_text(study: Study, task: str, method: str) -> str:
    """The setting that a cell is reported at, in words; a number that is the lowest or highest on offer says so."""
    number = study.settings.get((task, method))
    if number is None:
        return NONE
    settings = study.plan.methods[method].settings
    return setting_text(settings[number], {name: _edge(name, settings[number], settings) for name in settings[number]})


def _edge(name: str, setting: Mapping[str, Any], settings: tuple[Mapping[str, Any], ...]) -> str:
    offered = {other[name] for other in settings if type(other.get(name)) in (int, float)}
    value = setting[name]
    if len(offered) < 2 or type(value) not in (int, float):
        return ""
    return " (lowest)" if value == min(offered) else " (highest)" if value == max(offered) else ""


def setting_text(setting: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> str:
    """A setting in words: ``rate 0.1``."""
    parts = []
    for name, value in setting.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{name} {text}{(notes or {}).get(name, '')}")
    return ", ".join(parts) or "the only one"


def search_table(study: Study) -> Table | None:
    """By how much the chosen setting of every cell won its search; ``None`` before any search is finished."""
    rows = []
    for (task, method), scores in search_scores(study.plan, study.searched()).items():
        measure, sign = _measure(study.plan.task_of(task), study.plan.protocol.select_by)
        settings = study.plan.methods[method].settings
        cells = [NONE, NONE]
        (best, first), *others = scores.items()
        if others:
            second, score = others[0]
            cells = [f"{setting_text(settings[second])}: {measure.write(sign * score)}", measure.write(first - score)]
        rows.append((task, method, setting_text(settings[best]), measure.write(sign * first), *cells))
    caption = (
        f"Means over {len(study.plan.protocol.search_seeds)} search seed(s), on the selection rows. A small margin means that "
        "other seeds might have chosen otherwise."
    )
    columns = ("task", "method", "chosen", "score", "runner-up", "margin")
    return Table("search", "What the search chose", caption, columns, tuple(rows)) if rows else None


def _measure(task: Task, by: str) -> tuple[Measure, float]:
    """How a selection score is written, and the sign that makes a figure of it."""
    measure = Measure(task.metric if by == "metric" else by)
    return measure, -1.0 if measure.lower_is_better else 1.0
