"""Trials as tasks of a Ray cluster: the nodes read the plan's data folder and model by the same paths.

Plain tasks, not Ray Tune: Tune's loop takes over order, retries and resumption, and keeps their state in a folder of its own,
beside which ``results.jsonl`` would be a second record. Here those three are the sweep's, the same on every backend, and Ray
is left with what it alone can do: find the processors.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator
from typing import Any

from ...errors import StateError
from ..extras import extra
from .plan import Trial
from .workers import Outcome, attempt

_STORE = 100 * 2**20  # of bytes; a line is all that a trial hands back, and Ray would reserve a third of the memory
_MOST = 500  # characters of an error that a library wrote


class RayPool:
    """``jobs`` trials at a time, each on ``threads`` processors, on the cluster that ``RAY_ADDRESS`` names, else here.

    Where the cluster has GPUs, a trial takes its share of them, one at most; on this machine trials share, as local ones do.
    A cluster that is started here has ``jobs * threads`` processors, obeys this process alone, reports to nobody, and
    writes its logs below ``RAY_TMPDIR``, else ``/tmp``. A worker imports the libraries once and runs trial after trial.

    Args:
        jobs: trials. threads: of torch, and the processors, of each. plan: the plan's digest, for the lines.
        command: its first words.

    Raises:
        HiddenKeyError: Ray is not installed.
        StateError: the cluster does not start or does not answer.
    """

    def __init__(self, jobs: int, threads: int, plan: str, command: str) -> None:
        self.ray = extra("ray", "ray")
        self._joined = not self.ray.is_initialized()  # whoever joined a cluster before leaves it by himself
        if self._joined:
            _join(self.ray, jobs * threads)
        _warn_of_small_nodes(self.ray, threads)
        # OpenMP reads this when torch is imported, long before anyone could call torch.set_num_threads.
        environment = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
        # A task that died is told apart from one that failed, and tried again by the sweep: Ray must not do it too.
        self._task = self.ray.remote(
            num_cpus=threads, num_gpus=_share(self.ray, jobs), max_retries=0, runtime_env=environment
        )(_run)
        self._jobs, self._arguments = jobs, (threads, plan, command, os.getcwd())
        self._busy: dict[Any, tuple[Trial, float]] = {}

    @property
    def free(self) -> int:
        """How many more trials may be handed over."""
        return self._jobs - len(self._busy)

    @property
    def running(self) -> list[tuple[str, float]]:
        """(id, seconds since it was handed over) of every running trial, those that wait for a processor included."""
        now = time.monotonic()
        return [(trial.id, now - since) for trial, since in self._busy.values()]

    def submit(self, trial: Trial) -> None:
        """Hand a trial over."""
        self._busy[self._task.remote(trial, *self._arguments)] = (trial, time.monotonic())

    def finished(self, timeout: float) -> Iterator[tuple[Trial, Outcome]]:
        """Trials that finished within ``timeout`` seconds; a worker or node that died ends its trial with the reason."""
        ready, _ = self.ray.wait(list(self._busy), timeout=timeout)
        for reference in ready:
            trial, _ = self._busy.pop(reference)
            try:
                outcome: Outcome = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                outcome = f"{type(error).__name__}: {_line(error)}"
            yield trial, outcome

    def close(self) -> None:
        """Cancel what runs, and leave the cluster; one that was started here ends."""
        for reference in self._busy:
            self.ray.cancel(reference, force=True)
        if self._joined:
            self.ray.shutdown()


def _join(ray: Any, processors: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _knock(address)
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Its ports are open to the network and ask for a token; Ray would write one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(
            "local",  # else a cluster that somebody started on this machine would be joined
            num_cpus=processors,
            object_store_memory=_STORE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,  # its warning is that it asks for a token
        )
    except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
        ray.shutdown()
        mend = "unset it for a cluster on this machine" if address else "RAY_TMPDIR must be a short path"
        given = f"RAY_ADDRESS {address!r}" if address else "no RAY_ADDRESS"
        raise StateError(f"the Ray cluster does not start or answer (got {given}: {_line(error)}); {mend}") from None


def _knock(address: str) -> None:
    """Raises OSError where nothing listens: Ray would go on trying for more than five minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():  # else a word such as "auto"
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _warn_of_small_nodes(ray: Any, threads: int) -> None:
    """No error: a cluster that grows on demand may have no such node yet. Ray itself waits and says nothing."""
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if largest < threads:
        warnings.warn(
            f"no node of the cluster has the processors of one trial (got {threads} threads, the largest has {largest:.0f}); "
            "trials wait until one joins, or give fewer --threads",
            stacklevel=3,
        )


def _share(ray: Any, jobs: int) -> float:
    """What part of a GPU each of ``jobs`` trials gets, in the ten thousandths that Ray counts; 0 without any."""
    return math.floor(10_000 * min(1.0, ray.cluster_resources().get("GPU", 0) / jobs)) / 10_000


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:_MOST]


def _run(trial: Trial, threads: int, plan: str, command: str, folder: str) -> Outcome:
    with contextlib.suppress(OSError):  # where the node has the sweep's folder, relative paths mean the same
        os.chdir(folder)
    return attempt(trial, threads, plan, command, _MOST)
