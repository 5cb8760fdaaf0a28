"""Processes that work for another."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

from ..errors import HiddenKeyError


class LostWorkerError(HiddenKeyError):
    """A process that made batches or tokens died: killed, as a rule, because memory ran out."""

    exit_code = 1


_LOOK = 0.5  # seconds between looks for the parent


def leave_with_parent() -> None:
    """Called in a process of ``multiprocessing``: end it when its parent is gone, whatever it is doing then.

    A killed parent says nothing: who waits for work would wait for ever, and hold the locks that it was forked with.
    """
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    # The sentinel alone is not enough: it is a pipe of the parent, and whatever else was forked there keeps it open.
    process = multiprocessing.parent_process()
    assert process is not None
    while not wait([process.sentinel], _LOOK) and os.getppid() == parent:
        pass
    os._exit(1)
