"""A sweep: the trials of a plan that have no line yet, in the order of the protocol, until all have one."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

from ...errors import StateError
from ..extras import extra
from ..folder import locked, read_json, write_json, write_text
from ..provenance import weights_digest
from .lines import ResultLine, append_line, read_lines
from .plan import CURVE, FINAL, Plan, Trial
from .reading import load_plan
from .selection import winners
from .workers import Outcome, Workers

RESULTS, PLAN, DIGEST = "results.jsonl", "plan.yaml", "plan.digest"
WEIGHTS = "weights.json"
"""Model folder -> digest of the weights in it that the folder's lines began with."""
_TICK = 0.5


class Pool(Interface):
    """What runs trials; see :class:`.workers.Workers`."""

    @property
    def free(self) -> int: ...  # noqa: D102
    @property
    def running(self) -> list[tuple[str, float]]: ...  # noqa: D102
    def submit(self, trial: Trial) -> None: ...  # noqa: D102
    def finished(self, timeout: float) -> Iterator[tuple[Trial, Outcome]]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Sweep:
    """A plan and the folder of its results.

    Args:
        plan: a checked plan. text: the plan's file, kept beside the results. out: the folder, new or of the same plan.
        retries: how often a trial that failed is tried again before its failure stands. A failure of an earlier call
            is tried again; a loss that became NaN is not, it would again.

    Raises:
        StateError: the folder holds another plan's results, or something else; or final runs of this plan when it had
            other comparisons or seeds.
    """

    def __init__(self, plan: Plan, text: str, out: str | Path, retries: int = 1) -> None:
        self.plan, self.text, self.out, self.retries = plan, text, Path(out), retries
        self.lines: dict[str, ResultLine] = {}
        self._known: list[Trial] | None = None
        self._open()
        self.tries: Counter[str] = Counter()
        self.started: set[str] = set()

    def run(self, pool: Callable[[], Pool], only: str | None = None, slice_seconds: float | None = None) -> int:
        """Run what is missing; returns how many trials are still without a result. That a loss became NaN is one.

        Args:
            pool: makes the processes. only: one trial's id. slice_seconds: start nothing after so many seconds.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out, "another sweep is running"):  # they would run the same trials twice
            self._open()  # once more: another sweep may have been here since
            write_text(self.out / DIGEST, self.plan.digest + "\n")
            self._check_weights()
            if self.plan.measure == "bleu":
                extra("sacrebleu", "text")
            write_text(self.out / PLAN, self.text)
            started, display = time.monotonic(), Display(len(self.trials()))
            workers = pool()
            try:
                while True:
                    late = slice_seconds is not None and time.monotonic() - started > slice_seconds
                    waiting = [] if late else self.waiting(only)
                    for trial in waiting[: workers.free]:
                        self.started.add(trial.id)
                        workers.submit(trial)
                    if not workers.running:
                        break
                    for trial, outcome in workers.finished(_TICK):
                        self._keep(trial, outcome, display)
                    display.show(self, workers)
            finally:
                workers.close()
        return sum(1 for trial in self.trials() if not ((line := self.line_of(trial)) and line.has_result))

    def trials(self) -> list[Trial]:
        """All trials that are known so far: finals and curves join when their settings have been chosen."""
        if self._known is None:
            chosen = self.winners()
            found = (*self.plan.search(), *self.plan.final(chosen), *self.plan.along_curves(chosen))
            self._known = list({trial.id: trial for trial in found}.values())  # curves may cross
        return self._known

    def winners(self) -> Mapping[tuple[str, str], int]:
        """The chosen settings of every (task, method) whose search is finished."""
        return winners(self.plan, (line for line in self.lines.values() if self._stands(line)))

    def waiting(self, only: str | None = None) -> list[Trial]:
        """Trials to start, most urgent first."""
        found = [trial for trial in self.trials() if trial.id not in self.started and not self.settled(trial)]
        if only is None:
            return found
        known = {trial.id: trial for trial in self.trials()}
        if only not in known:
            raise StateError(
                f"the plan has no such trial yet (got {only!r}, it has {len(known)}, such as {next(iter(known))!r}); "
                "finals and curves exist once their search is finished"
            )
        return [trial for trial in found if trial.id == only]

    def line_of(self, trial: Trial) -> ResultLine | None:
        """The trial's line, if there is one.

        A curve's trial is named by what it varies: a line around a setting that a later search did not choose is none of its.
        """
        line = self.lines.get(trial.id)
        other = line is not None and trial.stage == CURVE and dict(line.setting) != dict(trial.setting)
        return None if other else line

    def settled(self, trial: Trial) -> bool:
        """Whether the trial has a result, or has failed for good."""
        line = self.line_of(trial)
        return line is not None and self._stands(line)

    def _stands(self, line: ResultLine) -> bool:
        return line.has_result or self.tries[line.id] > self.retries

    def _keep(self, trial: Trial, outcome: Outcome, display: Display) -> None:
        self.started.discard(trial.id)
        self.tries[trial.id] += 1
        if isinstance(outcome, ResultLine):
            outcome = _without_texts(self.plan, outcome) or outcome
        line = outcome if isinstance(outcome, ResultLine) else _failed(trial, self.plan.digest, outcome)
        append_line(self.out / RESULTS, line)
        self.lines[trial.id], self._known = line, None
        display.finished(line)

    def _open(self) -> None:
        """Read what lies in the folder, or refuse it."""
        self._check()
        lines = read_lines(self.out / RESULTS) if (self.out / RESULTS).is_file() else []
        self.lines, self._known = {line.id: line for line in lines}, None
        self._check_fixed()

    def _check(self) -> None:
        if self.out.is_file():
            raise StateError(f"the output folder is a file (got {str(self.out)!r}); choose another --out")
        digest = self.out / DIGEST
        if digest.is_file():
            found = digest.read_text(encoding="utf-8").strip()
            if found != self.plan.digest:
                raise StateError(
                    f"the folder holds the results of another plan (got {str(self.out)!r} of plan {found}, this one is "
                    f"{self.plan.digest}); choose another --out, or give the plan that lies in it ({PLAN})"
                )
        elif self.out.is_dir() and any(not file.name.startswith(".") for file in self.out.iterdir()):
            # Hidden files are a lock, and what a kill left of a file that was being written.
            raise StateError(f"the folder holds other files (got {str(self.out)!r}); choose another --out")

    def _check_weights(self) -> None:
        """A model that was made here may be made anew: lines of two would look like those of one."""
        names = {trial.config.model for trial in self.trials()}
        found = {name: weights_digest(Path(name)) for name in sorted(names) if Path(name).is_dir()}
        file = self.out / WEIGHTS
        if file.is_file():
            for name, had in read_json(file).items():
                if found.get(name, had) != had:
                    raise StateError(
                        f"the folder's lines began with other weights (got {found[name]} in {name!r}, they had {had}); put "
                        "those back, or choose another --out"
                    )
        elif found:
            write_json(file, found)

    def _check_fixed(self) -> None:
        """What is tested is fixed once a final run could have been looked at."""
        if not any(line.stage == FINAL for line in self.lines.values()):
            return
        file = self.out / PLAN
        if not file.is_file():
            what = f"the folder has final runs and no plan to compare with (got {str(self.out)!r} without {PLAN})"
            raise StateError(f"{what}; put the plan back that they were run by")
        before = load_plan(file, self.plan.data)
        for name, has in self.plan.fixed.items():
            had = before.fixed[name]
            if had != has:
                raise StateError(
                    f"the folder has final runs, after which a plan keeps its {name} (got {_changes(had, has)} "
                    f"in {str(self.out)!r}); give the plan that lies in it ({PLAN}), or choose another --out"
                )


def _changes(had: tuple[Any, ...], has: tuple[Any, ...]) -> str:
    """What was added and what is missing, in words."""
    parts = (
        ("new: ", [item for item in has if item not in had]),
        ("missing: ", [item for item in had if item not in has]),
    )
    said = [word + ", ".join(map(str, items)) for word, items in parts if items]
    return " and ".join(said) or "another order"


class Display:
    """Progress on standard error: one line that moves on a terminal, else one now and then; failures stay."""

    def __init__(self, total: int) -> None:
        self.total, self.seconds, self.ended = total, 0.0, 0
        self.terminal = sys.stderr.isatty()
        self.last = 0.0

    def finished(self, line: ResultLine) -> None:
        """A trial ended."""
        self.ended += 1
        self.seconds += line.seconds
        if not line.done:
            self._write(f"failed: {line.id}: {line.error}", end="\n")

    def show(self, sweep: Sweep, pool: Pool) -> None:
        """Where the sweep stands."""
        now = time.monotonic()
        if now - self.last < (0.5 if self.terminal else 30.0):
            return
        self.last = now
        trials = sweep.trials()
        done = sum(1 for trial in trials if sweep.settled(trial))
        running = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in pool.running)
        left = ""
        if self.ended:
            jobs = max(len(pool.running) + pool.free, 1)
            minutes = self.seconds / self.ended * (len(trials) - done) / jobs / 60
            left = f", {minutes:.0f} min left for these"
        self._write(f"{done}/{len(trials)} trials{left}; {running}", end="" if self.terminal else "\n")

    def _write(self, text: str, end: str) -> None:
        print(f"\r\x1b[2K{text}" if self.terminal else text, end=end, file=sys.stderr, flush=True)


def _without_texts(plan: Plan, line: ResultLine) -> str | None:
    """Why a final run is no result after all: the plan tests its texts, and there are none."""
    wanted = plan.measure == "bleu" and line.stage == FINAL and line.done and plan.task_of(line.task).kind == "lm"
    if not wanted or "bleu" in line.history[line.chosen]["report"]:
        return None
    absent = line.texts.get("absent", {})
    return f"no texts to test: {absent.get('texts') or absent.get('bleu') or 'they have no BLEU'}"


def _failed(trial: Trial, plan: str, error: str) -> ResultLine:
    return ResultLine(
        id=trial.id,
        plan=plan,
        stage=trial.stage,
        task=trial.task,
        method=trial.method,
        seed=trial.seed,
        status="failed",
        dataset=str(trial.config.task),
        train_size=trial.train_size,
        setting=dict(trial.setting),
        rank=trial.config.rank,
        error=error,
    )


def equal_share(jobs: int) -> int:
    """Threads of each of ``jobs`` processes that share this machine's processors."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def local_pool(plan: Plan, jobs: int, threads: int | None, command: str) -> Pool:
    """Processes on this machine; threads default to an equal share of its processors."""
    return Workers(jobs, threads or equal_share(jobs), plan.digest, command)
