"""What a figure was measured on (versions, processor, commit), and what may be changed of it (threads, memory)."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import masks

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h: how much free memory is kept, how many blocks may be mapped
PACKAGES = ("hiddenkey_rs", "numpy", "torch")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name as its maker gives it, or as near as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:  # not a Linux
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that this package is checked out at, ``-dirty`` behind it if files differ; None outside a checkout."""
    here = Path(__file__).resolve()
    # Installed into an environment inside somebody else's repository, git would answer for that one: ask for this file.
    if _git(here.parent, "ls-files", "--error-unmatch", "--", "../__init__.py") is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


@contextmanager
def recycled_memory() -> Iterator[bool]:
    """For a while glibc hands freed memory out again, however large. Yields whether it does: other C libraries do not.

    By itself glibc takes large blocks from the system and gives them back each time, and new pages cost several times
    what it takes to fill them. Allocators that people train with (jemalloc, tcmalloc, a GPU's caching one) keep them.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):
        yield False
        return
    try:
        yield bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
    finally:
        mallopt(_MMAP_MAX, 65536)
        mallopt(_TRIM_THRESHOLD, 1 << 17)
        trim(0)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """``count`` threads for the mask engine and for torch; what was set before comes back afterwards."""
    import torch

    before = masks.get_num_threads(), torch.get_num_threads()
    set_threads(count)
    try:
        yield
    finally:
        masks.set_num_threads(before[0])
        torch.set_num_threads(before[1])


def set_threads(count: int) -> None:
    """``count`` threads for the mask engine and for torch."""
    import torch

    masks.set_num_threads(count)
    torch.set_num_threads(count)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
