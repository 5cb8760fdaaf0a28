"""How much memory a stretch of work takes at most: of a GPU where work runs on one, else of the process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from .job import on_cpus

_PROC = Path("/proc/self")


class PeakMemory:
    """The peak between :meth:`begin` and :meth:`end`, the largest of several such stretches.

    A process that does one thing after the other keeps its largest peak for good: Linux forgets it when asked to. Where it
    cannot be asked (other systems, a sandbox), the peak is that of the process since it began, and ``of`` says so.

    Attributes:
        mib: the peak so far, in MiB; ``None`` before the first end.
        of: ``"device"`` (what torch had allocated on the GPU), ``"training"`` (the process, in these stretches) or
            ``"process"`` (the process, since it began).
    """

    def __init__(self) -> None:
        self.mib: float | None = None
        self.of = "process"

    def begin(self) -> None:
        """Forget the peak so far."""
        if torch.cuda.is_available() and not on_cpus():
            torch.cuda.reset_peak_memory_stats()
            self.of = "device"
        else:
            self.of = "training" if _forget() else "process"

    def end(self) -> None:
        """Take the peak since :meth:`begin` in."""
        if self.of == "device":
            now = torch.cuda.max_memory_allocated() / 2**20
        else:
            now = _resident() if self.of == "training" else since_start()
        self.mib = max(self.mib or 0.0, now)


def _forget() -> bool:
    """Let the peak begin anew at what is in memory now."""
    try:
        (_PROC / "clear_refs").write_text("5", encoding="ascii")
        _resident()
    except (OSError, ValueError):
        return False
    return True


def _resident() -> float:
    """MiB at most, since the peak was forgotten."""
    for line in (_PROC / "status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise ValueError("the system does not tell a process its peak")


def since_start() -> float:
    """MiB at most, since the process began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts in bytes, Linux in KiB
