"""Folders of results, read and checked: every line belongs to the folder's plan and holds what a report needs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..sweep.lines import ResultLine, numbered_lines
from ..sweep.plan import CURVE, FINAL, SEARCH, Plan, Trial, varied_place
from ..sweep.reading import load_plan
from ..sweep.runner import PLAN, RESULTS
from ..sweep.selection import winners

Cell = tuple[str, str]
"""(task, method)."""


@dataclass(frozen=True)
class Found:
    """A result line and where it stands: ``FILE, line N``."""

    line: ResultLine
    place: str

    @property
    def done(self) -> bool:
        """Whether the trial ran to its end."""
        return self.line.done

    @property
    def diverged(self) -> bool:
        """Whether a loss became NaN."""
        return self.line.diverged


@dataclass(frozen=True)
class Study:
    """One plan and all of its results so far, from one folder or several.

    ``settings``: the number of the setting that every (task, method) is reported at. ``provisional``: cells whose search is
    not finished, and that are reported at the setting their final runs have.
    """

    plan: Plan
    folders: tuple[str, ...]
    found: Mapping[str, Found]
    settings: Mapping[Cell, int]
    provisional: frozenset[Cell]

    @property
    def name(self) -> str:
        """The plan's name."""
        return self.plan.name

    def stage(self, stage: str) -> list[Found]:
        """Lines of a stage, in the file's order."""
        return [item for item in self.found.values() if item.line.stage == stage]

    def finals(self, task: str, method: str) -> list[Found]:
        """Final runs of a cell's reported setting, done and failed, by seed."""
        return self._finals.get((task, method), [])

    @cached_property
    def _finals(self) -> Mapping[Cell, list[Found]]:
        found: dict[Cell, list[Found]] = {}
        for item in sorted(self.stage(FINAL), key=lambda item: item.line.seed):
            if self._fits(item):
                found.setdefault((item.line.task, item.line.method), []).append(item)
        return found

    def seeds(self, method: str) -> tuple[int, ...]:
        """The final seeds that the plan has for a method."""
        return self.plan.protocol.final_seeds[: self.plan.methods[method].final_seeds]

    def along(self, key: str, task: str, method: str, value: Any) -> list[Found]:
        """Runs of one point of a curve, around the reported setting."""
        curve = self.plan.curves[key]
        place = task, method, varied_place(curve.vary, value)
        own = (item for item in self._curves.get(place, ()) if self._fits(item))
        return [item for item in own if item.line.seed in curve.seeds]

    @cached_property
    def _curves(self) -> Mapping[tuple[str, str, str], list[Found]]:
        found: dict[tuple[str, str, str], list[Found]] = {}
        for item in self.stage(CURVE):
            found.setdefault((item.line.task, item.line.method, _place(item.line)), []).append(item)
        return found

    def _fits(self, item: Found) -> bool:
        """Whether a run is of its cell's reported setting and its plan's seeds; of a curve's all but the varied field counts."""
        line, method = item.line, self.plan.methods[item.line.method]
        number = self.settings.get((line.task, line.method))
        if line.stage == SEARCH or number is None:
            return line.stage == SEARCH
        if line.stage == FINAL:
            return _place(line) == str(number) and line.seed in self.seeds(line.method)
        vary = _place(line).partition("=")[0]
        varied = method.rate_field if vary == "rate" else vary
        held, wanted = dict(line.setting), dict(method.settings[number])
        return {**held, varied: None} == {**wanted, varied: None}

    def searched(self) -> Iterator[ResultLine]:
        """Settled lines. A search of which a run crashed is not finished: it is tried again, and the setting may still change."""
        return (item.line for item in self.found.values() if item.line.has_result)

    def superseded(self) -> list[Found]:
        """Finals and curves around settings that a later search did not choose, or of other seeds; they count nowhere."""
        return [item for item in self.found.values() if not self._fits(item)]

    @cached_property
    def expected(self) -> Mapping[str, list[tuple[Cell, str | None]]]:
        """Stage -> ((task, method), id) of every trial of the plan; no id where the search must choose its setting first."""
        chosen = {(task, method): 0 for task in self.plan.tasks for method in self.plan.methods} | dict(self.settings)
        trials = {
            SEARCH: self.plan.search(),
            FINAL: self.plan.final(chosen),
            CURVE: self.plan.along_curves(chosen),
        }
        return {stage: [self._expected(trial) for trial in planned] for stage, planned in trials.items()}

    def _expected(self, trial: Trial) -> tuple[Cell, str | None]:
        cell = trial.task, trial.method
        return cell, trial.id if trial.stage == SEARCH or cell in self.settings else None

    @cached_property
    def missing(self) -> Mapping[str, list[tuple[Cell, str | None]]]:
        """What of :attr:`expected` has no result: no line that is done or diverged, of the setting that was chosen."""
        done = {name for name, item in self.found.items() if item.line.has_result and self._fits(item)}
        return {
            stage: [(cell, name) for cell, name in planned if name is None or name not in done]
            for stage, planned in self.expected.items()
        }

    def failed(self) -> list[Found]:
        """Trials whose last line says ``failed``, those that diverged included."""
        return [item for item in self.found.values() if not item.done]


def read_studies(folders: Sequence[str | Path]) -> list[Study]:
    """The studies in these folders. Folders of the same plan are parts of one study; of equal ids the last result counts.

    Raises:
        DataError: a folder without results or plan, lines of another plan, a line that lacks a figure (with the line), or
            parts of one study that test different things.
    """
    plans: dict[str, Plan] = {}
    parts: dict[str, list[tuple[str, dict[str, Found]]]] = {}
    for folder in folders:
        plan, found = _read(Path(folder))
        clash = next(
            (other for other in plans.values() if other.name == plan.name and other.digest != plan.digest), None
        )
        if clash is not None:
            raise DataError(
                f"two plans go by one name (got {plan.name!r} again in {str(folder)!r}, with other contents); report them "
                "apart, or rename one"
            )
        _check_parts(plans.setdefault(plan.digest, plan), plan, parts.get(plan.digest, ()), str(folder))
        parts.setdefault(plan.digest, []).append((str(folder), found))
    return [_study(plans[digest], held) for digest, held in parts.items()]


def _check_parts(first: Plan, plan: Plan, before: Iterable[tuple[str, Any]], folder: str) -> None:
    for name, had in first.fixed.items():
        if plan.fixed[name] != had:
            raise DataError(
                f"parts of one study have plans with other {name} (got {folder!r} beside {next(iter(before))[0]!r}); what is "
                "tested is fixed beforehand, so report them apart"
            )


def _read(folder: Path) -> tuple[Plan, dict[str, Found]]:
    if not (folder / RESULTS).is_file():
        raise DataError(
            f"the folder holds no results (got {str(folder)!r} without {RESULTS}); give the --out of hiddenkey sweep"
        )
    if not (folder / PLAN).is_file():
        raise DataError(f"the results lack their plan (got {str(folder)!r} without {PLAN}); copy the plan there")
    plan = load_plan(folder / PLAN, "data")  # where the rows lie does not matter any more
    found = {}
    for number, line in numbered_lines(folder / RESULTS).items():
        item = Found(line, f"{folder / RESULTS}, line {number}")
        _check(item, plan, folder)
        found[line.id] = item
    if not found:
        raise DataError(
            f"the folder holds no results yet (got an empty {str(folder / RESULTS)!r}); run the sweep first"
        )
    return plan, found


def _check(item: Found, plan: Plan, folder: Path) -> None:
    line = item.line
    if line.plan != plan.digest:
        raise DataError(
            f"results of different plans lie in one folder (got plan {line.plan} in {item.place}, and {plan.digest} in "
            f"{folder / PLAN}); keep each plan's results in a folder of their own"
        )
    unknown = line.task not in plan.tasks or line.method not in plan.methods
    if unknown or line.stage not in (SEARCH, FINAL, CURVE) or len(line.id.split("/")) != 5:
        raise DataError(f"a result is none of its plan's trials (got {line.id!r} in {item.place}); remove the line")
    if not item.done:
        return
    metric = plan.task_of(line.task).metric
    for entry in line.history:
        for part in ("train", "select") if line.stage == SEARCH else ("train", "select", "report"):
            lacking = [name for name in ("loss", metric) if not _is_figure(entry.get(part, {}).get(name))]
            if lacking:
                raise DataError(
                    f"a result lacks a figure (got no {lacking[0]} of {part} rows in epoch {entry.get('epoch')} of "
                    f"{line.id!r}, {item.place}); run the trial again"
                )


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _study(plan: Plan, parts: Iterable[tuple[str, dict[str, Found]]]) -> Study:
    folders, found = [], {}
    for folder, held in parts:
        folders.append(folder)
        for name, item in held.items():
            if item.line.has_result or name not in found:  # a crash elsewhere takes no result away
                found[name] = item
    study = Study(plan, tuple(folders), found, {}, frozenset())
    chosen = dict(winners(plan, study.searched()))
    counts: dict[Cell, Counter[int]] = {}
    for item in study.stage(FINAL):
        cell = item.line.task, item.line.method
        if cell not in chosen:
            counts.setdefault(cell, Counter())[int(_place(item.line))] += 1
    provisional = {cell: numbers.most_common(1)[0][0] for cell, numbers in counts.items()}
    return dataclasses.replace(study, settings={**chosen, **provisional}, provisional=frozenset(provisional))


def _place(line: ResultLine) -> str:
    """The setting's part of a trial's id."""
    return line.id.split("/")[2]
