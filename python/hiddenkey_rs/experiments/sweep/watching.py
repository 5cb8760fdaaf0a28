"""What is looked at while a trial trains: rows held back, every few epochs, and whether the loss is still a number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from ...train.trainer import logged_rates
from ..features import Example
from ..memory import PeakMemory
from ..outcomes import Outcomes, outcomes
from ..tasks import Task
from .lines import pack_examples
from .plan import Trial
from .selection import chosen_epoch


class DivergedTrialError(Exception):
    """A loss that is no number, at this optimiser step."""

    def __init__(self, step: int) -> None:
        super().__init__(f"training diverged at step {step}")
        self.step = step


class Watcher(TrainerCallback):
    """Looks at the held-back rows every few epochs, and stops a run whose loss is no number."""

    def __init__(
        self, trial: Trial, task: Task, model: Any, parts: dict[str, list[Example]], collate: Callable[..., Any]
    ) -> None:
        self.trial, self.task, self.model, self.parts, self.collate = trial, task, model, parts, collate
        self.history: list[dict[str, Any]] = []
        self.best: Outcomes | None = None
        self.last: Outcomes | None = None
        self.weights: dict[str, torch.Tensor] = {}
        # Of training alone, up to the last look: what looks take is everybody's.
        self.training_seconds, self.steps, self.rows = 0.0, 0, 0
        self.rates: dict[str, list[float]] = {}
        self.memory = PeakMemory()
        self.clock = time.perf_counter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._train_on()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """A loss that is no number ends the trial; measured rates are kept."""
        for site, rate in logged_rates(logs or {}).items():
            self.rates.setdefault(site, []).append(rate)
        if logs is not None and not math.isfinite(logs.get("loss", 0.0)):
            self.memory.end()
            raise DivergedTrialError(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One entry of the history; per-example outcomes of the best epoch so far and of the last."""
        config = self.trial.config
        if not is_look(round(state.epoch), config.epochs, self.trial.protocol.looks):
            return
        self.training_seconds += time.perf_counter() - self.clock
        self.steps, self.rows = state.global_step, round(state.epoch * len(self.parts["train"]))
        self.memory.end()
        rows = config.train_eval_rows or len(self.parts["train"])
        found = {}
        for name, part in self.parts.items():
            examples = part[:rows] if name == "train" else part
            found[name] = outcomes(
                self.model, examples, self.task, self.collate, config.eval_batch_size, bf16=config.bf16
            )
        figures = {name: rounded(result.figures(self.task)) for name, result in found.items()}
        if not all(math.isfinite(entry["loss"]) for entry in figures.values()):
            raise DivergedTrialError(state.global_step)
        self.history.append({"epoch": round(state.epoch, 4), "step": state.global_step, **figures})
        self.last = found.get("report")
        if chosen_epoch(self.history, self.task, self.trial.protocol.select_by) == len(self.history) - 1:
            self.best = self.last
            if self.task.source is not None:  # what texts are generated with
                self.weights = {name: value.detach().clone() for name, value in self._learning()}
        self._train_on()

    def _train_on(self) -> None:
        self.memory.begin()
        self.clock = time.perf_counter()

    def restore_best(self) -> None:
        """Give the model of a data-to-text task the weights of its best epoch."""
        with torch.no_grad():
            for name, value in self._learning():
                value.copy_(self.weights[name])

    def packed(self) -> dict[str, dict[str, str | None]]:
        """What a line's ``examples`` holds."""
        ends = {"chosen": self.best, "last": self.last}
        return {when: pack_examples(found.correct, found.loss) for when, found in ends.items() if found is not None}

    def _learning(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)


def is_look(epoch: int, epochs: int, looks: int | None) -> bool:
    """Whether rows held back are looked at after this epoch (from 1): ``looks`` times, evenly, the last time at the end.

    Example:
        >>> [epoch for epoch in range(1, 11) if is_look(epoch, 10, 4)]
        [3, 5, 8, 10]
    """
    return looks is None or epoch * looks // epochs > (epoch - 1) * looks // epochs


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures as lines hold them."""
    return {name: round(value, 6) for name, value in figures.items()}
