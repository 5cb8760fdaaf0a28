"""The machine that figures are measured on: what it is, and what may be changed of it (threads, memory)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from .. import masks
from ..experiments.provenance import commit, processor, versions

__all__ = ["commit", "processor", "recycled_memory", "set_threads", "using_threads", "versions"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h: how much free memory is kept, how many blocks may be mapped


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
