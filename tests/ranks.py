"""Several processes with a gloo process group, for tests. They are forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any
from unittest.mock import patch

_CONTEXT = multiprocessing.get_context("forkserver")
_LOADED = [
    "torch",
    "torch.distributed.fsdp",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "trl",
    "sklearn.metrics",
]
_LOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "t5")]
_LOADED += ["matplotlib.pyplot", "hiddenkey_rs.train", "hiddenkey_rs.cli.train", "hiddenkey_rs.experiments.run"]
_LOADED += ["families", "distributed_work"]
_CONTEXT.set_forkserver_preload(_LOADED)


def _serve() -> None:
    """Start the server, which looks for the tests' own modules where the environment says."""
    path = os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH"))))
    with patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


@dataclass(frozen=True)
class Failure:
    """How a rank ended that did not return: the exception's type and text, or its exit code."""

    kind: str
    text: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(world: int, work: Callable[..., Any], *arguments: Any) -> list[tuple[Any, Any]]:
    """(process, its end of a pipe) of every rank of ``work(*arguments)``."""
    _serve()
    port, found = free_port(), []
    for rank in range(world):
        here, there = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank, args=(rank, world, port, there, work, arguments), daemon=True)
        process.start()
        there.close()
        found.append((process, here))
    return found


def finish(started: list[tuple[Any, Any]], timeout: float = 120) -> list[Any]:
    """What every rank returned, or its :class:`Failure`. Who takes too long is killed, and is one."""
    deadline, found = time.monotonic() + timeout, []
    for process, pipe in started:
        try:
            result = pipe.recv() if pipe.poll(max(deadline - time.monotonic(), 0)) else Failure("hang", "no answer")
        except EOFError:
            process.join(5)
            result = Failure("exit", str(process.exitcode))
        found.append(result)
    for process, _ in started:
        process.kill()
        process.join()
    return found


def run(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Results of ``work(*arguments)`` on every rank; an assertion if one of them fails."""
    found = finish(start(world, work, *arguments), timeout)
    for number, result in enumerate(found):
        assert not isinstance(result, Failure), f"rank {number}: {result.kind}: {result.text}"
    return found


def _rank(rank: int, world: int, port: int, pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
    )
    if world == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    import torch

    torch.set_num_threads(1)
    try:
        result: Any = work(*arguments)
    except Exception as error:
        result = Failure(type(error).__name__, f"{error}\n{traceback.format_exc()}")
    pipe.send(result)
    pipe.close()
    os._exit(0)  # a process group may wait for a peer that is gone
