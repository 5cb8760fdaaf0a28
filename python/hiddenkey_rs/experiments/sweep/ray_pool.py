"""Trials as tasks of a Ray cluster: the nodes read the plan's data folder and model by the same paths.

Ray places the trials and nothing more: which are run, in which order, and what is kept is the protocol's, so neither Tune's
search algorithms nor its checkpoints have a part to play.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ...errors import HiddenKeyError
from ..extras import extra
from .plan import Trial
from .workers import Outcome


class RayPool:
    """``jobs`` trials at a time, each on ``threads`` processors, on the cluster that ``RAY_ADDRESS`` names, else here."""

    def __init__(self, jobs: int, threads: int, plan: str, command: str) -> None:
        self.ray = extra("ray", "ray")
        if not self.ray.is_initialized():
            import os

            if os.environ.get("RAY_ADDRESS"):
                self.ray.init(log_to_driver=False)
            else:
                self.ray.init(num_cpus=jobs * threads, include_dashboard=False, log_to_driver=False)
        environment = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
        # A task that died is told apart from one that failed, and tried again by the sweep: Ray must not do it too.
        self._task = self.ray.remote(num_cpus=threads, max_retries=0, runtime_env=environment)(_run)
        self._jobs, self._arguments = jobs, (threads, plan, command)
        self._busy: dict[Any, tuple[Trial, float]] = {}

    @property
    def free(self) -> int:
        """How many more trials may be handed over."""
        return self._jobs - len(self._busy)

    @property
    def running(self) -> list[tuple[str, float]]:
        """(id, seconds since it was handed over) of every running trial."""
        now = time.monotonic()
        return [(trial.id, now - since) for trial, since in self._busy.values()]

    def submit(self, trial: Trial) -> None:
        """Hand a trial over."""
        self._busy[self._task.remote(trial, *self._arguments)] = (trial, time.monotonic())

    def finished(self, timeout: float) -> Iterator[tuple[Trial, Outcome]]:
        """Trials that finished within ``timeout`` seconds."""
        ready, _ = self.ray.wait(list(self._busy), timeout=timeout)
        for reference in ready:
            trial, _ = self._busy.pop(reference)
            try:
                outcome: Outcome = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            yield trial, outcome

    def close(self) -> None:
        """Cancel what runs, and leave the cluster."""
        for reference in self._busy:
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()


def _run(trial: Trial, threads: int, plan: str, command: str) -> Outcome:
    from .trial import run_trial

    try:
        return run_trial(trial, plan, f"{command} --only {trial.id}", threads)
    except HiddenKeyError as error:
        return " ".join(str(error).split())
