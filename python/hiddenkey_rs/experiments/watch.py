"""What happens around a run's training steps: evaluation, logs, progress, mask digests, the best adapter."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..attachment import DrawnMask, Handle
from ..errors import HiddenKeyError
from ..train import ranks
from ..train.trainer import logged_rates
from .folder import ADAPTER, LOG, MASKS, RUN_STATE, append_line, read_json, replace_folder, write_json
from .tasks import Task
from .whole import whole_weights


class DivergedError(HiddenKeyError):
    """The training loss is no longer a number: going on would only waste time."""

    exit_code = 1


Evaluation = Callable[[], dict[str, dict[str, float]]]


@dataclass
class RunState:
    """What a run has found so far; saved with every checkpoint."""

    history: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)
    training_seconds: float = 0.0

    def best(self, task: Task) -> int:
        """Index of the best evaluation: by the task's metric on the development set, then by loss, then the earliest."""
        sign = 1 if task.lower_is_better else -1
        return min(
            range(len(self.history)),
            key=lambda n: (sign * self.history[n]["dev"][task.metric], self.history[n]["dev"]["loss"], n),
        )

    def evaluated(self, step: int) -> bool:
        """Whether the run was evaluated after this step."""
        return bool(self.history) and self.history[-1]["step"] == step

    @classmethod
    def load(cls, checkpoint: Path) -> RunState:
        """The state that was saved with a checkpoint."""
        return cls(**read_json(checkpoint / RUN_STATE))


class Watcher(TrainerCallback):
    """Evaluates every epoch, keeps the best adapter, writes ``log.jsonl`` and ``masks.jsonl``, shows progress.

    On several ranks every one of them evaluates its share, and the first alone writes and speaks.
    """

    def __init__(
        self, out: Path, task: Task, state: RunState, evaluation: Evaluation, model: Any, log_masks: int
    ) -> None:
        self.out, self.task, self.run, self.evaluation, self.model = out, task, state, evaluation, model
        self.first = ranks.rank() == 0
        self.handle: Handle | None = None
        self.check_interrupt: Callable[[], None] = lambda: None
        self.masks_left = log_masks
        self.progress: Progress | None = None
        self.clock = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the progress line."""
        self.progress = Progress(state.max_steps, state.global_step) if self.first else None
        self.clock = time.perf_counter()
        self.masks_left = max(0, self.masks_left - -(-state.global_step // args.logging_steps))
        # A checkpoint of an epoch's last step is written before the epoch's end, and the Trainer goes on behind it.
        if state.global_step and float(state.epoch).is_integer() and not self.run.evaluated(state.global_step):
            self.on_epoch_end(args, state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the masks of the steps that the log will show, as far as asked for."""
        if self.first and self.handle is not None and self.masks_left and state.global_step % args.logging_steps == 0:
            self.masks_left -= 1
            self.handle.record_masks(lambda mask: append_line(self.out / MASKS, _digest(mask)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the progress line on, or stop if that was asked for."""
        self.check_interrupt()
        if self.handle is not None:
            self.handle.record_masks(None)
        if self.progress is not None:
            self.progress.step(state.global_step)
        if state.global_step >= state.max_steps:  # a run shorter than the distance between log lines has one, too
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line of ``log.jsonl`` a logged step."""
        if logs is None or "loss" not in logs:
            return
        if self.first:
            append_line(self.out / LOG, {"step": state.global_step, **logs})
        if not math.isfinite(logs["loss"]):
            raise DivergedError(f"training diverged (got loss {logs['loss']} at step {state.global_step}); lower --lr")
        for site, rate in logged_rates(logs).items():
            self.run.rates.setdefault(site, []).append(rate)
        if self.progress is not None:
            self.progress.loss = logs["loss"]

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, and keep the adapter if it is the best so far."""
        if self.run.evaluated(state.global_step):  # resumed where it had ended
            return
        self.run.training_seconds += time.perf_counter() - self.clock
        found = self.evaluation()
        for rows, figures in found.items():
            if not math.isfinite(figures["loss"]):
                raise DivergedError(
                    f"training diverged (got loss {figures['loss']} of {rows} rows after step {state.global_step}); lower --lr"
                )
        entry = {"epoch": round(state.epoch, 4), "step": state.global_step, **found}
        self.run.history.append(entry)
        best = self.run.best(self.task) == len(self.run.history) - 1
        weights = whole_weights(self.model) if best else None
        if self.first:
            append_line(self.out / LOG, {"step": state.global_step, "evaluation": entry})
            if best:
                replace_folder(self.out / ADAPTER, partial(self._save_adapter, weights))
        if self.progress is not None:
            dev = found["dev"]
            self.progress.note(
                f"epoch {entry['epoch']:g}: dev loss {dev['loss']:.4f}, {self.task.metric} {dev[self.task.metric]:.4f}"
            )
        self.clock = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The history goes with the checkpoint."""
        now = time.perf_counter()
        self.run.training_seconds += now - self.clock
        self.clock = now
        ranks.wait()  # what this file stands beside is whole: every rank's part of it
        if self.first:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / RUN_STATE, asdict(self.run))

    def _save_adapter(self, weights: dict[str, Any] | None, folder: Path) -> None:
        self.model.save_pretrained(folder, state_dict=weights)
        if self.handle is not None:
            self.handle.config.save_pretrained(folder)


class Progress:
    """Progress on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.start, self.first = total, time.perf_counter(), done
        self.loss: float | None = None
        self.terminal = sys.stderr.isatty()
        self.last = self.start

    def step(self, done: int) -> None:
        """``done`` optimiser steps are done."""
        now = time.perf_counter()
        if now - self.last < (0.2 if self.terminal else 10.0) and done < self.total:
            return
        self.last = now
        left = (now - self.start) / max(done - self.first, 1) * (self.total - done)
        filled = 24 * done // max(self.total, 1)
        bar = f"[{'#' * filled}{'.' * (24 - filled)}] " if self.terminal else ""
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        text = f"{bar}step {done}/{self.total}  {loss}{int(left) // 60}:{int(left) % 60:02d} left"
        self._show(text, end="" if self.terminal and done < self.total else "\n")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._show(text, end="\n")

    def _show(self, text: str, end: str) -> None:
        print(f"\r\x1b[2K{text}" if self.terminal else text, end=end, file=sys.stderr, flush=True)


def _digest(mask: DrawnMask) -> dict[str, Any]:
    """A mask's coordinates and the SHA-256 of its decisions (one byte each, 1 = keep), for checking it elsewhere."""
    return {
        **asdict(mask.key),
        "pattern": mask.drop.pattern,
        "rate": mask.drop.rate,
        "samples": mask.samples.tolist(),
        "lengths": mask.lengths.tolist(),
        "shape": list(mask.keep.shape),
        "sha256": hashlib.sha256(mask.keep.cpu().numpy().tobytes()).hexdigest(),
    }
