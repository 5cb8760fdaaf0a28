"""The processes of one run: their group, and an end for all of them when one fails, is lost or is told to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import HiddenKeyError
from ..train import ranks
from ..train.heartbeat import heartbeat, lost
from .extras import extra

# How torch and gloo speak of a peer that is gone.
_GONE = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "recvValue failed", "Broken pipe")


def on_cpus() -> bool:
    """Whether training is on CPUs, and accelerate must be told.

    Otherwise several processes would train each by itself, and one would be refused bfloat16.
    """
    import torch

    return not torch.accelerator.is_available()


@contextmanager
def job() -> Iterator[None]:
    """Work inside runs on every process that torchrun or accelerate started; without either there is one.

    Inside another one it does nothing.

    Raises:
        LostRankError: a process is gone.
    """
    if ranks.launched()[1] == 1 or ranks.world_size() > 1:
        yield
        return
    from torch import distributed

    extra("accelerate").PartialState(cpu=on_cpus())  # chooses the device and makes the process group
    try:
        with heartbeat():
            yield
    except HiddenKeyError:
        raise
    except RuntimeError as error:
        # gloo's place in its source before, advice behind
        text = str(error).partition("\n")[0].partition(" This is typically")[0].rpartition("] ")[2].rstrip(". ")
        if not any(word in str(error) for word in _GONE):
            raise
        raise lost(text) from None
    distributed.destroy_process_group()
