"""``hiddenkey train`` on several processes: one folder, one voice, the same figures, and an end when a process is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import distributed_work as work
import ranks

pytestmark = pytest.mark.distributed

FLAGS = (
    *("--model", "gpt2-tiny", "--rank", "2", "--batch-size", "4", "--log-every", "1"),
    *("--eval-batch-size", "5", "--threads", "1", "--epochs", "3"),
)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rows = [{"sentence1": f"a b {n}", "sentence2": "c " * (n % 5 + 1), "label": n % 2} for n in range(35)]
    for name, part in (("train", rows[:22]), ("dev", rows[22:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    names = ("train", "dev")
    return [*FLAGS, *(flag for name in names for flag in (f"--{name}-file", str(tmp_path / f"{name}.jsonl")))]


def train(files: list[str], out: Path, *flags: str) -> list[str]:
    return ["train", *files, "--out", str(out), *flags]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """The same logs line by line and the same end, to the reduction's rounding."""
    first, second = lines(one), lines(other)
    assert len(first) == len(second) >= 12
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        for name in ("loss", "task_loss", "consistency_loss", "realised_rate_ffn"):
            assert a.get(name) == pytest.approx(b.get(name), abs=2e-5), (a["step"], name)
    figures = [json.loads((out / "metrics.json").read_text()) for out in (one, other)]
    for part in ("train", "dev", "test"):
        assert figures[0][part] == pytest.approx(figures[1][part], abs=2e-5)


def wait_for(path: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def torchrun(*flags: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "hiddenkey_rs"]


@pytest.mark.slow
def test_torchrun_makes_the_run_of_one_process(files: list[str], tmp_path: Path) -> None:
    command = [
        *torchrun("--nproc-per-node", "2", "--master-port", str(ranks.free_port())),
        *train(files, tmp_path / "two"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("measured rates:") == 1
    assert done.stderr.count("epoch 2: dev loss") == 1
    assert (
        ranks.run(1, work.command, train(files, tmp_path / "one", "--loader", "hiddenkey", "--batch-size", "8"))[0][0]
        == 0
    )
    assert_same_run(tmp_path / "one", tmp_path / "two")
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]
    recorded = json.loads((tmp_path / "two" / "config.json").read_text())
    assert recorded["spread"] == {"processes": 2, "accumulation": 1, "rows": 8, "loader": "hiddenkey"}


@pytest.mark.slow
def test_what_all_were_given_wrongly_is_one_line(files: list[str], tmp_path: Path) -> None:
    command = [*torchrun("--nproc-per-node", "2", "--master-port", str(ranks.free_port()))]
    command += train(files, tmp_path / "run", "--rate", "1.5")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert_said_once(done.stderr, "rate must be a number in [0, 1) (got 1.5)")
    assert "exitcode  : 2" in done.stderr, "torchrun's own code is always 1"
    found = ranks.run(2, work.command, train(files, tmp_path / "run", "--rank", "x"))
    assert [code for code, _ in found] == [2, 2]
    assert_said_once("".join(said for _, said in found), "--rank")
    assert not (tmp_path / "run").exists(), "nothing half-done"


def assert_said_once(text: str, message: str) -> None:
    said = [line for line in text.splitlines() if line.startswith("hiddenkey: error:")]
    assert len(said) == 1, text
    assert message in said[0]


def test_what_is_wrong_on_one_rank_ends_all(files: list[str], tmp_path: Path) -> None:
    other = train(files, tmp_path / "run", "--train-file", "nowhere.jsonl")
    (code, said), (other_code, other_said) = ranks.run(2, work.command, [train(files, tmp_path / "run"), other])
    assert (code, other_code) == (2, 2)
    assert "error:" not in other_said
    assert "hiddenkey: error: on rank 1: there is no such data file (got 'nowhere.jsonl')" in said
    assert said.count("error:") == 1
    (tmp_path / "other.jsonl").write_text((tmp_path / "train.jsonl").read_text().replace("a b 3", "a b 4"))
    other = train(files, tmp_path / "run", "--train-file", str(tmp_path / "other.jsonl"))
    (code, said), (other_code, other_said) = ranks.run(2, work.command, [train(files, tmp_path / "run"), other])
    assert (code, other_code) == (2, 2)
    assert "error:" not in other_said
    assert "hiddenkey: error: the ranks differ in their data (got " in said


@pytest.mark.parametrize(("before", "after", "killed"), [(2, 1, 1), (1, 2, 0)])
@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_others_go_on(
    before: int, after: int, killed: int, files: list[str], tmp_path: Path
) -> None:
    """Steps of 8 rows on 2 processes, on 1 with two micro-batches, on 3 with uneven shares."""
    sizes = ["--batch-size", "8"] if before == 1 else []
    flags = [*sizes, "--loader", "hiddenkey", "--save-steps", "2", "--epochs", "5"]
    assert ranks.run(1, work.command, train(files, tmp_path / "whole", *flags, "--batch-size", "8"))[0][0] == 0
    started = ranks.start(before, work.command, train(files, tmp_path / "cut", *flags))
    wait_for(tmp_path / "cut" / "checkpoint-6" / "run_state.json")
    os.kill(started[killed][0].pid, signal.SIGKILL)
    clock = time.monotonic()
    found = ranks.finish(started, timeout=60)
    assert time.monotonic() - clock < 60
    assert found[killed] == ranks.Failure("exit", "-9"), "the run ended before it could be killed"
    for ended in found[:killed] + found[killed + 1 :]:
        # The store goes with rank 0. If the heartbeat sees that before a collective fails, it ends the process, and what it
        # said with it.
        if killed == 0 and ended == ranks.Failure("exit", "1"):
            continue
        code, said = ended
        assert code == 1
        assert "hiddenkey: error: a rank was lost (got " in said
        assert "start the job again" in said
    for code, said in ranks.run(after, work.command, train(files, tmp_path / "cut", *flags, "--resume", "auto")):
        assert code == 0, said
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    again = ranks.run(1, work.command, train(files, tmp_path / "cut", *flags, "--resume", "auto"))
    assert again[0][0] == 0, "a finished run has nothing left to do"


def test_ctrl_c(files: list[str], tmp_path: Path) -> None:
    started = ranks.start(2, work.command, train(files, tmp_path / "run", "--epochs", "400"))
    wait_for(tmp_path / "run" / "checkpoint-3" / "run_state.json")
    for process, _ in started:  # as torchrun hands it on
        os.kill(process.pid, signal.SIGINT)
    clock = time.monotonic()
    (code, said), (other_code, other_said) = ranks.finish(started, timeout=60)
    assert time.monotonic() - clock < 60
    assert (code, other_code) == (130, 130)
    assert said.endswith("hiddenkey: interrupted\n")
    assert "interrupted" not in other_said


@pytest.mark.slow
def test_fsdp_from_the_command_line(files: list[str], tmp_path: Path) -> None:
    test = ["--test-file", files[files.index("--dev-file") + 1]]
    one = train([*files, *test], tmp_path / "one", "--loader", "hiddenkey", "--batch-size", "8")
    assert ranks.run(1, work.command, one)[0][0] == 0
    found = ranks.run(2, work.command, train([*files, *test], tmp_path / "two", "--fsdp"), True)
    assert [code for code, _ in found] == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    evaluate = ["eval", "--run", str(tmp_path / "two"), "--json", str(tmp_path / "again.json")]
    assert ranks.run(1, work.command, evaluate)[0][0] == 0
    written = json.loads((tmp_path / "two" / "metrics.json").read_text())
    again = json.loads((tmp_path / "again.json").read_text())
    for part in ("dev", "test"):
        assert again[part] == pytest.approx(written[part], abs=1e-6), "the adapter was gathered whole"
    (code, said), _ = ranks.run(2, work.command, train(files, tmp_path / "three", "--fsdp"))
    assert code == 2
    assert "it would train without FSDP" in said


@pytest.mark.slow
def test_a_killed_node_and_the_job_that_goes_on_without_it(files: list[str], tmp_path: Path) -> None:
    """Two agents of torchrun meet on loopback; one is killed with its worker; the other starts the job anew, alone."""
    port, out = ranks.free_port(), tmp_path / "run"
    flags = ["--loader", "hiddenkey", "--save-steps", "2", "--epochs", "8"]
    assert ranks.run(1, work.command, train(files, tmp_path / "whole", *flags, "--batch-size", "8"))[0][0] == 0
    job = train(files, out, *flags, "--resume", "auto")
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    agents = [ranks.start(1, work.agent, port, log is logs[0], str(log), job)[0] for log in logs]
    second = agents[1][0].pid
    try:
        wait_for(out / "checkpoint-6" / "run_state.json", seconds=200)
        assert json.loads((out / "config.json").read_text())["spread"]["processes"] == 2
        workers = Path(f"/proc/{second}/task/{second}/children").read_text().split()
        for pid in (second, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
    finally:
        found = ranks.finish(agents, timeout=250)
    assert found == [None, ranks.Failure("exit", "-9")], logs[0].read_text()[-3000:]
    assert_same_run(out, tmp_path / "whole")
    assert "a rank was lost" in logs[0].read_text()
