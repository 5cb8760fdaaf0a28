"""What is read off a run: figures with a name, a direction and a way to be written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ..statistics import Interval
from ..sweep.lines import ResultLine, per_example
from ..sweep.plan import Plan
from ..tasks import Task
from ..text_metrics import LOWER_IS_BETTER
from .studies import Found

Array = NDArray[np.float64]

_SHARES = {"accuracy", "f1", "matthews", "pearson", "spearman", "ece", "token_accuracy"}
_LOW = {"loss", "ece", "perplexity", *LOWER_IS_BETTER}


@dataclass(frozen=True)
class Measure:
    """A figure of a run.

    ``name``: key among the figures. ``when``: ``"chosen"`` or ``"last"`` epoch. ``gap``: not the reported rows' figure but
    how much worse they fare than the rows fitted on.
    """

    name: str
    when: str = "chosen"
    gap: bool = False

    @property
    def key(self) -> str:
        """One word for files: ``loss_last``, ``loss_gap_last``."""
        return f"{self.name}{'_gap' if self.gap else ''}_{self.when}"

    @property
    def title(self) -> str:
        """A few words for headings."""
        name = {"ece": "ECE", "f1": "F1"}.get(self.name, self.name.replace("_", " "))
        name = f"{name} gap" if self.gap else name
        return f"{name}, {self.when} epoch"

    @property
    def lower_is_better(self) -> bool:
        """Whether small is good."""
        return self.gap or self.name in _LOW

    def of(self, found: Found) -> float | None:
        """The run's figure; ``None`` where it has none (the ECE of a regression) or no number."""
        entry = at(found.line, self.when)
        value = entry["report"].get(self.name)
        if value is None or not math.isfinite(value):
            return None
        if not self.gap:
            return float(value)
        sign = 1 if self.name in _LOW else -1
        return sign * (float(value) - float(entry["train"][self.name]))

    def rows(self, found: Found, task: Task) -> Array | None:
        """(rows,) outcomes whose mean is the figure, or ``None``: a correlation is no mean, nor are tokens rows."""
        if self.gap or task.kind == "lm" or self.name not in ("accuracy", "loss"):
            return None
        try:
            correct, loss = per_example(found.line, self.when)
        except DataError as error:
            what, _, mend = str(error).partition("; ")
            raise DataError(f"{what.removesuffix(')')}, {found.place}); {mend}") from None
        return loss if self.name == "loss" else None if correct is None else correct.astype(np.float64)

    def write(self, value: float | None, signed: bool = False) -> str:
        """The value for a table: shares in percent."""
        if value is None or not math.isfinite(value):
            return "–"
        scaled, digits = (100 * value, 2) if self.name in _SHARES else (value, 3 if self.name == "loss" else 2)
        return f"{scaled:{'+' if signed else ''}.{digits}f}".replace("-", "−")

    def interval(self, found: Interval, signed: bool = False) -> str:
        """``mean ± half`` of a symmetric interval, or ``mean [low, high]`` of a difference."""
        middle = self.write(found.estimate, signed)
        if not math.isfinite(found.low):
            return middle
        if signed:
            return f"{middle} [{self.write(found.low, True)}, {self.write(found.high, True)}]"
        return f"{middle} ± {self.write((found.high - found.low) / 2)}"


def at(line: ResultLine, when: str) -> Mapping[str, Any]:
    """The history's entry of the chosen or the last epoch."""
    return line.history[line.chosen if when == "chosen" else -1]


def measures(task: Task) -> list[Measure]:
    """What is reported of a task: metric and loss with and without early stopping, over-fitting, of classes calibration."""
    found = [
        Measure(task.metric),
        Measure(task.metric, "last"),
        Measure("loss"),
        Measure("loss", "last"),
        Measure("loss", "last", gap=True),
    ]
    if task.kind == "classification":
        found.append(Measure("ece"))
    return found


def tested_on(plan: Plan, task: Task) -> Measure:
    """What a plan's family is tested on, of this task."""
    if plan.measure == "bleu" and task.kind == "lm":
        return Measure("bleu")
    return Measure("loss" if plan.measure == "loss" else task.metric)


def values(measure: Measure, found: list[Found]) -> dict[int, float]:
    """Seed -> figure, of the runs that are done and have one."""
    held = {item.line.seed: measure.of(item) for item in found if item.done}
    return {seed: value for seed, value in held.items() if value is not None}
