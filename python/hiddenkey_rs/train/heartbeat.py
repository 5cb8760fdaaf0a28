"""Lost ranks are noticed: every process leaves signs of life, and all end when one of them falls silent.

A collective waits as long as its process group lets it, which must be longer than the slowest step or evaluation. A sign
of life comes from a thread of its own, so a rank may take its time, but not vanish.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from ..errors import HiddenKeyError
from . import ranks

BEAT, SILENCE = 1.0, 25.0
"""Seconds between signs of life, and after which a rank without one is lost. torchrun then gives the stopped one 30 more,
and a minute is what a job may take to end."""
_END = "end"


class LostRankError(HiddenKeyError):
    """A process of the training is gone: the others cannot go on without it."""

    exit_code = 1


def lost(what: str) -> LostRankError:
    """The error that says so."""
    return LostRankError(f"a rank was lost (got {what}); start the job again, it can go on from its last checkpoint")


@contextmanager
def heartbeat(beat: float = BEAT, silence: float = SILENCE) -> Iterator[None]:
    """Watch the other ranks while the work inside runs; a lost one ends this process with a message and exit code 1.

    Needs a process group that was made from the environment (``MASTER_ADDR``, ``MASTER_PORT``), as torchrun gives it.

    Args:
        beat: seconds between signs of life. silence: after which a rank is lost.
    """
    if ranks.world_size() == 1:
        yield
        return
    run = ranks.gather(uuid.uuid4().hex)[0]  # keys of an earlier start of this job may still be there
    pulse = _Pulse(PrefixStore(f"hiddenkey/{run}", _client()), beat, silence)
    ranks.wait()  # for every rank's first sign
    thread = threading.Thread(target=pulse.run, name="hiddenkey heartbeat", daemon=True)
    thread.start()
    try:
        yield
        ranks.wait()  # a rank that is done stays alive until all are
    finally:
        pulse.stopped.set()
        thread.join(beat + 1)


def _client() -> Store:
    # A connection of its own: the process group's waits, with a lock, while a collective is set up.
    return TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=SILENCE)
    )


class _Pulse:
    """Rank 0 looks after all others, and they look after it."""

    def __init__(self, store: Store, beat: float, silence: float) -> None:
        self.store, self.beat, self.silence = store, beat, silence
        self.rank = ranks.rank()
        self.others = range(1, ranks.world_size()) if self.rank == 0 else range(1)
        self.stopped = threading.Event()
        self._sign(0)

    def run(self) -> None:
        """The thread: beat and look, until the work is done."""
        heard = {other: (b"", time.monotonic()) for other in self.others}
        number = 0
        while not self.stopped.wait(self.beat):
            number += 1
            try:
                self._sign(number)
                signs = self.store.multi_get([f"beat {other}" for other in self.others])
                if self.rank and self.store.check([_END]):  # rank 0 has said it
                    os._exit(LostRankError.exit_code)
            except RuntimeError:  # the store is on rank 0, or with the torchrun that started it
                signs, heard = [], {0: (b"", -math.inf)}
            now = time.monotonic()
            for other, sign in zip(self.others, signs, strict=False):
                if sign != heard[other][0]:
                    heard[other] = (sign, now)
            gone = [str(other) for other, (_, at) in heard.items() if now - at > self.silence]
            if gone and not self.stopped.is_set():
                self._end(", ".join(gone))

    def _sign(self, number: int) -> None:
        self.store.set(f"beat {self.rank}", str(number))

    def _end(self, gone: str) -> None:
        if self.rank <= 1:  # rank 1 speaks for the others where rank 0 is gone
            error = lost(f"no sign of life of rank {gone} for {self.silence:.0f} s")
            sys.stderr.write(f"hiddenkey: error: {error}\n")
            sys.stderr.flush()
        if self.rank == 0:
            with suppress(RuntimeError):
                self.store.set(_END, gone)
        # The main thread may wait in a collective for ever.
        os._exit(LostRankError.exit_code)
