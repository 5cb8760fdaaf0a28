"""The protocol's choices: rows to fit and to choose on, the epoch of a run, the setting of a method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import DataError
from ..data import Row, Splits, subset, subset_order
from ..tasks import Task
from .lines import ResultLine
from .plan import SEARCH, Plan, Protocol, Winners

_HALF, _REPORT, _SOURCES = 2, 3, 4
"""What a permutation is for: part of its seed, in which a subset's is 1."""


def split_rows(
    splits: Splits, size: int | None, protocol: Protocol, seed: int, unit: str | None = None
) -> tuple[list[Row], list[Row], list[Row]]:
    """(to fit on, to choose on, to report) of one seed. Smaller subsets of a seed are contained in its larger ones.

    Chosen on are training rows that no subset of this seed contains, or one fixed half of the development rows; reported
    are development rows that nothing was chosen on, at most ``report_rows`` of them, with ``report_test`` the test's too.
    Development rows that have the field ``unit`` in common (the source of several texts) are never divided. Training rows
    are drawn one by one: chosen on may be a paraphrase of a row that was fitted on.

    Raises:
        DataError: too few rows.
    """
    train, dev = splits.train, splits.dev
    if protocol.report_test and protocol.select_from == "train":
        dev = [*dev, *(splits.test or [])]
    wanted, most = protocol.select_rows, protocol.report_rows
    if protocol.select_from == "dev":
        fit = subset(train, size, seed)
        first, second = _halves(dev, unit)
        choose, report = [dev[n] for n in first[:wanted]], [dev[n] for n in sorted(second[:most])]
        report += (splits.test or []) if protocol.report_test else []
    else:
        if most is not None and most < len(dev):
            dev = [dev[n] for n in np.random.default_rng([_REPORT]).permutation(len(dev))[:most]]
        size = len(train) - wanted if size is None else size
        if size < 1 or size + wanted > len(train):
            raise DataError(
                f"too few training rows to fit and to choose on (got {len(train)}, wanted {size} and {wanted}); lower "
                "train_size or select_rows"
            )
        fit = subset(train, size, seed)
        choose, report = [train[n] for n in subset_order(len(train), seed)[len(train) - wanted :]], list(dev)
    return fit, choose, report


def drawn_sources(groups: Sequence[Any], count: int | None) -> list[Any]:
    """So many of the groups that texts are generated for, the same for all seeds and methods, in the order that they had.

    E2E's test rows stand in the order of how much they ask for: its first sources are its easiest.
    """
    order = np.random.default_rng([_SOURCES]).permutation(len(groups))[:count]
    return [groups[n] for n in sorted(order)]


def _halves(rows: Sequence[Row], unit: str | None) -> tuple[list[int], list[int]]:
    """Numbers of the rows of two fixed halves, by what they have in common, each in a fixed random order."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        groups[n if unit is None else row[unit]].append(n)
    held = list(groups.values())
    order = np.random.default_rng([_HALF]).permutation(len(held))
    halves = order[: len(held) // 2], order[len(held) // 2 :]
    first, second = ([n for group in half for n in held[group]] for half in halves)
    return first, second


def score(figures: Mapping[str, float], task: Task, by: str) -> float:
    """A score where more is better."""
    if by == "loss":
        return -figures["loss"]
    value = figures[task.metric if by == "metric" else by]
    return -value if by in ("metric", task.metric) and task.lower_is_better else value


def chosen_epoch(history: Sequence[Mapping[str, Any]], task: Task, by: str) -> int:
    """Index of the best selection score; of equals the one with the lower selection loss, then the earlier."""
    selected = [entry["select"] for entry in history]
    return max(range(len(selected)), key=lambda n: (score(selected[n], task, by), -selected[n]["loss"], -n))


def search_scores(plan: Plan, lines: Iterable[ResultLine]) -> dict[tuple[str, str], dict[int, float]]:
    """(task, method) -> mean selection score of every setting, best first, where the search is finished.

    ``lines``: all that are settled. Those of search seeds that the plan no longer has count for nothing. A setting of which a
    run failed has minus infinity.
    """
    settled = {line.id: line for line in lines}
    scores: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    open_cells = set()
    for trial in plan.search():
        line = settled.get(trial.id)
        if line is None:
            open_cells.add((trial.task, trial.method))
            continue
        task, by = plan.task_of(trial.task), plan.protocol.select_by
        value = score(line.history[line.chosen]["select"], task, by) if line.done else float("-inf")
        scores[trial.task, trial.method][trial.number].append(value)
    means = {
        cell: {number: float(np.mean(values)) for number, values in settings.items()}
        for cell, settings in scores.items()
        if cell not in open_cells
    }
    return {cell: dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))) for cell, found in means.items()}


def winners(plan: Plan, lines: Iterable[ResultLine]) -> Winners:
    """The setting with the best mean selection score of every (task, method) whose search is finished.

    Where no run of a search has a result, nothing was searched.
    """
    lines = list(lines)
    with_results = {(line.task, line.method) for line in lines if line.stage == SEARCH and line.has_result}
    return {cell: next(iter(found)) for cell, found in search_scores(plan, lines).items() if cell in with_results}
