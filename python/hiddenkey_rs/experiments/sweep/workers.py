"""Processes that run trials one after the other: libraries are imported and rows are read once a process."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from ...errors import HiddenKeyError
from ...loading.workers import leave_with_parent
from .lines import ResultLine
from .plan import Trial

TRIALS = 40
"""Of one process: oneDNN and torch's binding of it keep what they compiled for the last 1,024 shapes that they met, in
bfloat16 half a gigabyte and more, so that a process grows over its first trials. Without these caches a trial of a decoder
takes half as long again."""

Outcome = ResultLine | str
"""A trial's line, or why there is none."""


class Workers:
    """``jobs`` processes. A process that dies takes its trial with it and is replaced; nothing else is lost.

    Args:
        jobs: processes. threads: of torch, in each. plan: the plan's digest, for the lines. command: its first words.
    """

    def __init__(self, jobs: int, threads: int, plan: str, command: str) -> None:
        self._arguments = (threads, plan, command)
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[_Worker] = [self._new() for _ in range(jobs)]
        self._busy: dict[Connection, tuple[_Worker, Trial, float]] = {}

    @property
    def free(self) -> int:
        """How many processes wait for a trial."""
        return len(self._idle)

    @property
    def running(self) -> list[tuple[str, float]]:
        """(id, seconds so far) of every running trial."""
        now = time.monotonic()
        return [(trial.id, now - since) for _, trial, since in self._busy.values()]

    def submit(self, trial: Trial) -> None:
        """Hand a trial to an idle process."""
        worker = self._idle.pop()
        try:
            worker.connection.send(trial)
        except OSError:  # it died while it waited
            worker.process.join()
            worker = self._new()
            worker.connection.send(trial)
        self._busy[worker.connection] = (worker, trial, time.monotonic())

    def finished(self, timeout: float) -> Iterator[tuple[Trial, Outcome]]:
        """Trials that finished within ``timeout`` seconds."""
        for connection in wait(list(self._busy), timeout):
            worker, trial, _ = self._busy.pop(cast(Connection, connection))
            try:
                outcome: Outcome = worker.connection.recv()
                worker.trials += 1
                # A library that failed may have left the process unfit, as a fault on a GPU does.
                spent = worker.trials >= TRIALS or isinstance(outcome, str)
                self._idle.append(self._renewed(worker) if spent else worker)
            except (EOFError, OSError):
                worker.process.join()
                outcome = f"the process ended with exit code {worker.process.exitcode}"
                self._idle.append(self._new())
            yield trial, outcome

    def close(self) -> None:
        """End all processes, at once; what they were running leaves no line."""
        for worker in [*self._idle, *(worker for worker, _, _ in self._busy.values())]:
            worker.process.terminate()
            worker.process.join()

    def _renewed(self, worker: _Worker) -> _Worker:
        worker.connection.close()  # it ends by itself
        worker.process.join()
        return self._new()

    def _new(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        # OpenMP reads this when torch is imported, long before anyone could call torch.set_num_threads.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(self._arguments[0])
        try:
            process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        return _Worker(process, ours)


class _Worker:
    def __init__(self, process: Any, connection: Connection) -> None:
        self.process, self.connection = process, connection
        self.trials = 0


def attempt(trial: Trial, threads: int, plan: str, command: str, most: int | None = None) -> Outcome:
    """Run a trial; of what a library raises at most so many characters, default all."""
    try:
        from .trial import run_trial

        return run_trial(trial, plan, f"{command} --only {shlex.quote(trial.id)}", threads)
    except HiddenKeyError as error:
        return " ".join(str(error).split())
    except Exception as error:  # whatever a library raises is this trial's failure and no other's
        return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def _work(connection: Connection, threads: int, plan: str, command: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    leave_with_parent()  # a sweep that was killed leaves nothing behind that goes on for an hour
    while True:
        try:
            trial = connection.recv()
        except EOFError:
            return
        connection.send(attempt(trial, threads, plan, command))
        gc.collect()  # a trainer and its model point at each other
