"""Sweeps on Ray: the lines are those of local processes, and a worker that dies costs a try, nothing more."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

import hiddenkey_rs as hk
from hiddenkey_rs.experiments.sweep.ray_pool import RayPool
from hiddenkey_rs.experiments.sweep.reading import load_plan
from hiddenkey_rs.experiments.sweep.runner import Pool, Sweep, local_pool

with_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed (pip install -c constraints.txt 'ray>=2.40')"
)

PLAN = """\
name: p
protocol: {select_rows: 20, search_seeds: [0], final_seeds: [5]}
base: {model: gpt2-tiny, epochs: 1}
tasks:
  small: {task: demo, train_size: 30}
methods:
  hidden: {preset: hiddenkey, settings: [{rate: 0.1}, {rate: 0.2}]}
"""

MEASURED = ("seconds", "seconds_per_step", "examples_per_second", "peak_rss_mb", "peak_of")


@pytest.fixture
def ray_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ray's folder, by a name that is short wherever the tests' is: its sockets' paths end at 107 bytes."""
    opened = os.open(tmp_path, os.O_DIRECTORY)
    monkeypatch.setenv("RAY_TMPDIR", f"/proc/{os.getpid()}/fd/{opened}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "ray"
    os.close(opened)


def figures(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """What every trial came to, without what a clock or the system measured."""
    return {
        name: {key: value for key, value in vars(line).items() if key not in MEASURED}
        for name, line in sweep.lines.items()
    }


def kill_first(killed: list[int]) -> None:
    """Kill the first of this process' workers that is seen at a trial."""
    deadline = time.monotonic() + 60
    while not killed and time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.name().startswith("ray::_run"):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    return
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)


@with_ray
@pytest.mark.slow
def test_lines_equal_those_of_local_processes_though_a_worker_is_killed(tmp_path: Path, ray_folder: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = load_plan(tmp_path / "plan.yaml")
    local = Sweep(plan, PLAN, tmp_path / "local")
    assert local.run(lambda: local_pool(plan, 2, 1, "sweep")) == 0
    killed: list[int] = []
    watcher = threading.Thread(target=kill_first, args=(killed,))
    sweep = Sweep(plan, PLAN, tmp_path / "out")

    def pool() -> Pool:
        made = RayPool(2, 1, plan.digest, "sweep")
        watcher.start()
        return made

    assert sweep.run(pool) == 0
    watcher.join()
    assert len(killed) == 1
    assert sum(sweep.tries.values()) == len(sweep.lines) + 1 == 4
    assert figures(sweep) == figures(local)
    assert list(ray_folder.glob("session_*/logs"))
    assert not [child for child in psutil.Process().children(recursive=True) if "ray" in child.name()]


@with_ray
def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, ray_folder: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(hk.StateError, match=r"cluster does not start or answer \(got RAY_ADDRESS '127.0.0.1:1'"):
        RayPool(1, 1, "x", "sweep")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(hk.HiddenKeyError, match=r"needs the package 'ray' .* with its extra \[ray\]"):
        RayPool(1, 1, "x", "sweep")
