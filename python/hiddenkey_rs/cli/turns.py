"""Who speaks when several processes do the same work: the first, unless another one alone has something to say."""

from __future__ import annotations

import os
import sys
import time

PAUSE = 10.0
"""Seconds that the others leave the first process to say the same. Its launcher ends them as soon as it has ended."""


def say(text: str, error: BaseException | None) -> None:
    """A line on standard error, from one process. ``error``: what ended the work; ``None``: what all of them were given."""
    rank = int(os.environ.get("RANK", "0"))
    if rank and isinstance(error, KeyboardInterrupt):
        return
    if rank > 1 or (rank == 1 and not _is_lost(error)):  # who is left must speak at once: it will be ended, too
        time.sleep(PAUSE)
        if error is None or _is_on_all(error):
            return
    print(text, file=sys.stderr, flush=True)


def _is_lost(error: BaseException | None) -> bool:
    return type(error).__name__ == "LostRankError"


def _is_on_all(error: BaseException) -> bool:
    from ..train.ranks import is_on_all

    return _is_lost(error) or is_on_all(error)
