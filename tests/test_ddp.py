"""Two processes take the step that one takes: shared layers, heads in pieces and checkpointing under DDP (gloo)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def run(world: int, *arguments: str) -> dict[str, torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ddp_worker.py"), *arguments],
            env={**env, "RANK": str(rank), "PYTHONPATH": str(HERE)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    return torch.load(arguments[-1])


@pytest.mark.parametrize(
    ("family", "preset", "reentrant"),
    [("llama", "hiddenkey", "none"), ("llama", "hiddenkey", "no"), ("bert", "hiddenkey", "none")],
)
def test_two_ranks_take_the_step_of_one(family: str, preset: str, reentrant: str, tmp_path: Path) -> None:
    one = run(1, family, preset, reentrant, str(tmp_path / "one.pt"))
    two = run(2, family, preset, reentrant, str(tmp_path / "two.pt"))
    # the reduction adds in another order
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
