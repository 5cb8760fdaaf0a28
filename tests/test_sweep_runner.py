"""Sweeps: what has a line is not run again, failures stay and are tried again, finals wait for their search."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import hiddenkey_rs as hk
from hiddenkey_rs import StateError
from hiddenkey_rs.cli.main import main
from hiddenkey_rs.experiments.sweep import runner, workers
from hiddenkey_rs.experiments.sweep.lines import ResultLine, append_line, pack_examples, per_example, read_lines
from hiddenkey_rs.experiments.sweep.plan import SEARCH, Plan, Trial
from hiddenkey_rs.experiments.sweep.reading import load_plan
from hiddenkey_rs.experiments.sweep.runner import PLAN as PLAN_FILE
from hiddenkey_rs.experiments.sweep.runner import RESULTS, Sweep

PLAN = """\
name: p
protocol: {select_rows: 20, search_seeds: [0, 1], final_seeds: [5, 6]}
base: {model: gpt2-tiny, epochs: 1}
tasks:
  small: {task: demo, train_size: 30}
methods:
  none: {preset: none, settings: [{lr: 1.0e-3}, {lr: 2.0e-3}]}
  dropped: {preset: none, settings: [{lora_dropout: 0.1}, {lora_dropout: 0.2}]}
"""


def line(trial: Trial, score: float = 0.5, status: str = "done", step: int | None = None) -> ResultLine:
    entry = {"epoch": 1, "step": 1, "select": {"accuracy": score, "loss": 1 - score}}
    history = [entry] if status == "done" else []
    return ResultLine(
        id=trial.id, plan="x", stage=trial.stage, task=trial.task, method=trial.method, seed=trial.seed, status=status,
        history=history, step=step, seconds=1.0, setting=dict(trial.setting),
    )  # fmt: skip


class FakePool:
    """Runs trials by a function, ``jobs`` at a time; what the function raises ends the sweep as a kill would."""

    def __init__(self, outcome: Callable[[Trial], ResultLine | str], jobs: int = 2) -> None:
        self.outcome, self.jobs = outcome, jobs
        self.queue: list[Trial] = []
        self.order: list[str] = []
        self.closed = False

    @property
    def free(self) -> int:
        return self.jobs - len(self.queue)

    @property
    def running(self) -> list[tuple[str, float]]:
        return [(trial.id, 0.0) for trial in self.queue]

    def submit(self, trial: Trial) -> None:
        assert self.free
        self.queue.append(trial)
        self.order.append(trial.id)

    def finished(self, timeout: float) -> Iterator[tuple[Trial, ResultLine | str]]:
        trial = self.queue.pop(0)
        yield trial, self.outcome(trial)

    def close(self) -> None:
        self.closed = True


def plan_in(tmp_path: Path) -> Plan:
    (tmp_path / "plan.yaml").write_text(PLAN)
    return load_plan(tmp_path / "plan.yaml")


def sweep_in(tmp_path: Path, **options: int) -> Sweep:
    return Sweep(plan_in(tmp_path), PLAN, tmp_path / "out", **options)


def better_second(trial: Trial) -> ResultLine:
    return line(trial, 0.9 if "/1/" in trial.id else 0.6)


def test_fewer_retries_than_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_in(tmp_path)
    assert main(["sweep", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--retries", "-1"]) == 2
    assert "--retries must be at least 0 (got -1)" in capsys.readouterr().err


def test_finals_are_the_winners_on_every_final_seed(tmp_path: Path) -> None:
    sweep, pool = sweep_in(tmp_path), FakePool(better_second)
    assert sweep.run(lambda: pool) == 0
    assert pool.closed
    assert len(pool.order) == len(set(pool.order)) == 8 + 4
    finals = [name for name in pool.order if name.endswith("/final")]
    assert finals == [f"small/{method}/1/{seed}/final" for seed in (5, 6) for method in ("none", "dropped")]
    assert sweep.winners() == {("small", "none"): 1, ("small", "dropped"): 1}


def test_nothing_is_run_twice_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    count = 0

    def dying(trial: Trial) -> ResultLine:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return better_second(trial)

    first = FakePool(dying)
    with pytest.raises(KeyboardInterrupt):
        sweep_in(tmp_path).run(lambda: first)
    assert first.closed
    kept = {entry.id for entry in read_lines(tmp_path / "out" / RESULTS)}
    assert len(kept) == 3
    second = FakePool(better_second)
    assert sweep_in(tmp_path).run(lambda: second) == 0
    assert not kept & set(second.order)
    assert len(kept) + len(second.order) == 12
    third = FakePool(better_second)
    assert sweep_in(tmp_path).run(lambda: third) == 0
    assert third.order == []


def test_a_failure_is_tried_again_then_kept_and_tried_again_by_the_next_call(tmp_path: Path) -> None:
    def failing(trial: Trial) -> ResultLine | str:
        return "out of memory" if trial.id == "small/none/0/1/search" else better_second(trial)

    pool = FakePool(failing)
    sweep = sweep_in(tmp_path, retries=2)
    assert sweep.run(lambda: pool) == 1
    assert pool.order.count("small/none/0/1/search") == 3
    kept = {entry.id: entry for entry in read_lines(tmp_path / "out" / RESULTS)}
    assert kept["small/none/0/1/search"].status == "failed"
    assert kept["small/none/0/1/search"].error == "out of memory"
    again = FakePool(better_second)
    assert sweep_in(tmp_path).run(lambda: again) == 0
    assert again.order == ["small/none/0/1/search"]


def test_a_setting_that_diverges_cannot_win_and_is_not_run_again(tmp_path: Path) -> None:
    def diverging(trial: Trial) -> ResultLine:
        bad = trial.id.startswith("small/none/1/0")
        return line(trial, status="failed", step=7) if bad else better_second(trial)

    pool = FakePool(diverging)
    sweep = sweep_in(tmp_path)
    assert sweep.run(lambda: pool) == 0, "a result, too"
    assert pool.order.count("small/none/1/0/search") == 1
    assert sweep.winners() == {("small", "none"): 0, ("small", "dropped"): 1}


def test_a_sweep_in_which_something_diverged_is_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverging(trial: Trial) -> ResultLine:
        bad = trial.id == "small/none/0/0/search"
        found = line(trial, status="failed", step=7) if bad else better_second(trial)
        return dataclasses.replace(found, error="training diverged at step 7") if bad else found

    monkeypatch.setattr(runner, "local_pool", lambda *_: FakePool(diverging))
    plan_in(tmp_path)
    command = ["sweep", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "11 of 12 trials done, 1 diverged; hiddenkey report" in capsys.readouterr().out
    assert main([*command, "--only", "small/none/0/0/search"]) == 0
    assert "small/none/0/0/search: training diverged at step 7, which is its result" in capsys.readouterr().out


def test_a_search_of_which_every_run_crashed_chooses_nothing(tmp_path: Path) -> None:
    pool = FakePool(lambda trial: "out of memory" if trial.method == "none" else better_second(trial))
    sweep = sweep_in(tmp_path)
    assert sweep.run(lambda: pool) == 4
    assert sweep.winners() == {("small", "dropped"): 1}
    assert not any("none" in name and name.endswith("final") for name in pool.order)


def test_a_curve_around_a_setting_that_lost_in_the_end_is_run_again(tmp_path: Path) -> None:
    text = PLAN + "curves:\n  ranks: {vary: rank, values: [2], methods: [none], seeds: [0]}\n"
    first = FakePool(lambda trial: "lost" if trial.id.startswith("small/none/1/") else better_second(trial))
    assert resumed(tmp_path, text).run(lambda: first) == 2
    assert "small/none/rank=2/0/grid" in first.order
    second = FakePool(better_second)
    sweep = resumed(tmp_path, text)
    assert sweep.run(lambda: second) == 0
    assert sweep.winners()["small", "none"] == 1
    assert second.order.count("small/none/rank=2/0/grid") == 1
    assert sweep.lines["small/none/rank=2/0/grid"].setting == {"lr": 2.0e-3, "rank": 2}


def test_a_final_run_without_the_texts_that_are_tested_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    text = PLAN.replace("task: demo", "task: e2e").replace(
        "select_rows", "select_from: dev, select_by: loss, select_rows"
    )
    text += "comparisons: {baselines: [none], against: [dropped], measure: bleu}\n"
    (tmp_path / "plan.yaml").write_text(text)
    plan = load_plan(tmp_path / "plan.yaml", str(tmp_path / "data"))
    tried: list[str] = []

    def texts_at_last(trial: Trial) -> ResultLine:
        tried.append(trial.id)
        found = line(trial)
        report = {"loss": 1.0} | ({"bleu": 30.0} if trial.seed == 5 or tried.count(trial.id) > 2 else {})
        history = [{**found.history[0], "report": report}]
        return dataclasses.replace(found, history=history, texts={"absent": {"texts": "no memory"}})

    assert Sweep(plan, text, tmp_path / "out").run(lambda: FakePool(texts_at_last)) == 2
    kept = {entry.id: entry for entry in read_lines(tmp_path / "out" / RESULTS)}
    assert kept["small/none/0/6/final"].error == "no texts to test: no memory"
    assert kept["small/none/0/5/final"].done
    assert Sweep(plan, text, tmp_path / "out").run(lambda: FakePool(texts_at_last)) == 0


def test_no_final_starts_before_its_search_is_settled(tmp_path: Path) -> None:
    tried: list[str] = []

    def slow_to_succeed(trial: Trial) -> ResultLine | str:
        tried.append(trial.id)
        if trial.id == "small/none/1/1/search" and tried.count(trial.id) == 1:
            return "lost"
        return better_second(trial)

    pool = FakePool(slow_to_succeed, jobs=1)
    assert sweep_in(tmp_path).run(lambda: pool) == 0
    first_final = next(n for n, name in enumerate(pool.order) if name.startswith("small/none") and "final" in name)
    last_search = max(n for n, name in enumerate(pool.order) if name == "small/none/1/1/search")
    assert last_search < first_final


def test_a_slice_of_time_starts_nothing_more(tmp_path: Path) -> None:
    pool = FakePool(better_second)
    assert sweep_in(tmp_path).run(lambda: pool, slice_seconds=-1.0) == 8
    assert pool.order == []


def test_one_trial_alone(tmp_path: Path) -> None:
    pool = FakePool(better_second)
    sweep_in(tmp_path).run(lambda: pool, only="small/none/0/0/search")
    assert pool.order == ["small/none/0/0/search"]
    with pytest.raises(hk.StateError, match=r"no such trial yet \(got 'small/none/1/5/final'"):
        sweep_in(tmp_path).run(lambda: FakePool(better_second), only="small/none/1/5/final")


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    sweep_in(tmp_path).run(lambda: FakePool(better_second))
    (tmp_path / "plan.yaml").write_text(PLAN.replace("train_size: 30", "train_size: 31"))
    with pytest.raises(hk.StateError, match="results of another plan"):
        Sweep(load_plan(tmp_path / "plan.yaml"), PLAN, tmp_path / "out")
    with pytest.raises(hk.StateError, match="holds other files"):
        Sweep(plan_in(tmp_path), PLAN, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(hk.StateError, match="is a file"):
        Sweep(plan_in(tmp_path), PLAN, tmp_path / "file")


FAMILY = PLAN + "comparisons: {baselines: [none], against: [dropped]}\n"


def resumed(tmp_path: Path, text: str) -> Sweep:
    (tmp_path / "plan.yaml").write_text(text)
    return Sweep(load_plan(tmp_path / "plan.yaml"), text, tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("against: [dropped]", "against: []", r"keeps its comparisons .*got missing: dropped - none"),
        (
            "[none], against",
            "[none], pairs: [[none, dropped]], against",
            r"keeps its comparisons .*got new: none - dropped",
        ),
        (
            "final_seeds: [5, 6]",
            "final_seeds: [5, 6, 7]",
            r"keeps its final_seeds .*got new: 7 in .*choose another --out",
        ),
        ("final_seeds: [5, 6]", "final_seeds: [5]", r"keeps its final_seeds .*got missing: 6"),
        ("final_seeds: [5, 6]", "final_seeds: [6, 5]", r"keeps its final_seeds .*got another order"),
        ("search_seeds: [0, 1]", "search_seeds: [0, 2]", r"keeps its search_seeds .*got new: 2 and missing: 1"),
    ],
)
def test_the_family_is_fixed_by_the_first_final_run(old: str, new: str, message: str, tmp_path: Path) -> None:
    changed = FAMILY.replace(old, new)
    assert changed != FAMILY
    resumed(tmp_path, FAMILY).run(lambda: FakePool(better_second), only="small/none/0/0/search")
    resumed(tmp_path, changed).run(lambda: FakePool(better_second), only="small/none/0/0/search")
    assert resumed(tmp_path, FAMILY).run(lambda: FakePool(better_second)) == 0
    with pytest.raises(hk.StateError, match=message):
        resumed(tmp_path, changed)


def test_curves_are_free_and_a_folders_own_plan_fits_it(tmp_path: Path) -> None:
    resumed(tmp_path, FAMILY).run(lambda: FakePool(better_second))
    more = FAMILY + "curves:\n  ranks: {vary: rank, values: [2], methods: [none]}\n"
    pool = FakePool(better_second)
    assert resumed(tmp_path, more).run(lambda: pool) == 0
    assert pool.order == ["small/none/rank=2/0/grid"]
    kept = tmp_path / "out" / PLAN_FILE
    assert Sweep(load_plan(kept), kept.read_text(), tmp_path / "out").waiting() == []
    kept.unlink()
    with pytest.raises(hk.StateError, match=r"has final runs and no plan to compare with .*put the plan back"):
        resumed(tmp_path, more)


def test_the_command_of_a_trial_has_all_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[tuple[int, str]] = []

    def pool(plan: Plan, jobs: int, threads: int, command: str) -> FakePool:
        commands.append((threads, command))
        return FakePool(lambda trial: "lost" if "/0/0/" in trial.id else better_second(trial), jobs)

    monkeypatch.setattr(runner, "local_pool", pool)
    (tmp_path / "plan.yaml").write_text(FAMILY)
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "plan.yaml", "--out", "out", "--data", "some data", "--only"]
    assert main([*command, "small/none/1/0/search", "--threads", "3"]) == 0
    assert commands == [(3, "hiddenkey sweep plan.yaml --out out --data 'some data' --threads 3")]
    said = capsys.readouterr().err
    assert said.count("no comparison of this plan can reach p < .05 (got 0.5 at best") == 1
    assert main([*command, "small/none/0/0/search", "--retries", "0"]) == 1
    assert "the trial has no result (got 'small/none/0/0/search': lost)" in capsys.readouterr().err
    assert commands[1][0] == runner.equal_share(1)
    assert commands[1][1].endswith(f"--threads {commands[1][0]}")


def test_a_plan_with_seeds_enough_gets_no_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text(FAMILY.replace("[5, 6]", "[2, 3, 4, 5, 6, 7]"))
    assert main(["sweep", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "no comparison" not in capsys.readouterr().err


def test_two_sweeps_in_one_folder_are_refused(tmp_path: Path) -> None:
    def second(trial: Trial) -> ResultLine:
        with pytest.raises(hk.StateError, match="another sweep is running"):
            sweep_in(tmp_path).run(lambda: FakePool(better_second))
        return better_second(trial)

    sweep_in(tmp_path).run(lambda: FakePool(second))


def test_lines_come_back_as_they_were_and_torn_ones_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = plan_in(tmp_path).search()[0]
    correct, loss = np.array([True, False, True]), np.array([0.125, 2.0, 0.5])
    whole = dataclasses.replace(line(trial), examples={"chosen": pack_examples(correct, loss)})
    file = tmp_path / RESULTS
    append_line(file, whole)
    append_line(file, dataclasses.replace(whole, seed=9))
    found = read_lines(file)
    assert [entry.seed for entry in found] == [9]  # the last of equal ids
    bits, losses = per_example(found[0], "chosen")
    assert bits is not None
    np.testing.assert_array_equal(bits, correct)
    np.testing.assert_array_equal(losses, loss)
    with pytest.raises(hk.DataError, match="holds no outcomes of rows"):
        per_example(found[0], "last")
    with file.open("a") as out:
        out.write('{"id": "torn')
    assert len(read_lines(file)) == 1
    assert "torn" in capsys.readouterr().err
    append_line(file, dataclasses.replace(whole, id="after"))
    assert [entry.id for entry in read_lines(file)] == [trial.id, "after"]
    for bad, message in (("[1]", "no object"), ('{"id": "x"}', "lacks"), ("{nonsense}", "is no JSON")):
        file.write_text(bad + "\n")
        with pytest.raises(hk.DataError, match=rf"line 1.*{message}|{message}.*line 1"):
            read_lines(file)


@pytest.mark.slow
def test_a_real_sweep_survives_a_kill(tmp_path: Path) -> None:
    """The command, killed in the middle (no process stays behind), then run to its end."""
    (tmp_path / "plan.yaml").write_text(PLAN.replace("search_seeds: [0, 1]", "search_seeds: [0]"))
    command = [sys.executable, "-m", "hiddenkey_rs", "sweep", "plan.yaml", "--out", "out", "--jobs", "1"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    results = tmp_path / "out" / RESULTS
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not results.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {entry.id for entry in read_lines(results)}
    assert kept
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 of 8 trials done" in done.stdout
    lines = read_lines(results)
    assert len(lines) == 8
    assert all(entry.status == "done" and entry.history[0]["select"]["ece"] >= 0 for entry in lines)
    searched = [entry for entry in lines if entry.stage == SEARCH]
    final = next(entry for entry in lines if entry.stage != SEARCH)
    assert not any(entry.examples or "report" in entry.history[0] for entry in searched), "a search saw reported rows"
    bits, losses = per_example(final, "last")
    assert bits is not None
    figures = final.history[-1]["report"]
    assert figures["accuracy"] == pytest.approx(bits.mean(), abs=1e-6)
    assert figures["loss"] == pytest.approx(losses.mean(), abs=1e-3)


@pytest.mark.parametrize(("outcome", "replaced"), [("a line", [False, True]), ("a failure", [True, True])])
def test_a_process_is_replaced_after_its_trials_or_a_failure(
    outcome: str, replaced: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault on a GPU fails whatever its process would run afterwards."""
    ends: list[Connection] = []

    def new(_: workers.Workers) -> workers._Worker:
        ours, theirs = multiprocessing.Pipe()
        ends.append(theirs)
        return workers._Worker(SimpleNamespace(join=lambda: None, terminate=lambda: None), ours)

    monkeypatch.setattr(workers.Workers, "_new", new)
    monkeypatch.setattr(workers, "TRIALS", 2)
    trial = plan_in(tmp_path).search()[0]
    pool = workers.Workers(1, 1, "x", "command")
    for expected in replaced:
        before = len(ends)
        pool.submit(trial)
        ends[-1].send(line(trial) if outcome == "a line" else outcome)
        assert len(list(pool.finished(5))) == 1
        assert (len(ends) > before) is expected
        assert pool.free == 1
    pool.close()


@pytest.mark.slow
def test_a_process_that_died_idle_is_replaced(tmp_path: Path) -> None:
    text = PLAN.replace("task: demo", "task: webnlg-category")
    (tmp_path / "plan.yaml").write_text(text)
    trial = load_plan(tmp_path / "plan.yaml", str(tmp_path)).search()[0]
    pool = workers.Workers(1, 1, "x", "command")
    try:
        pool._idle[0].process.kill()
        pool._idle[0].process.join()
        pool.submit(trial)
        ((_, outcome),) = pool.finished(60)
        assert "WebNLG" in str(outcome)
    finally:
        pool.close()


@pytest.mark.parametrize("left", [[".lock"], [".lock", ".plan.yaml.123"], [".lock", "plan.digest"]])
def test_what_a_kill_at_the_start_leaves_is_no_other_plan(left: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).write_text(plan_in(tmp_path).digest if name == "plan.digest" else "")
    assert sweep_in(tmp_path).run(lambda: FakePool(better_second)) == 0


def test_lines_are_of_one_models_weights(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    (tmp_path / "plan.yaml").write_text(PLAN.replace("gpt2-tiny", str(model)))
    plan = load_plan(tmp_path / "plan.yaml")

    def sweep() -> Sweep:
        return Sweep(plan, (tmp_path / "plan.yaml").read_text(), tmp_path / "out")

    assert sweep().run(lambda: FakePool(better_second), slice_seconds=0.0)
    assert sweep().run(lambda: FakePool(better_second)) == 0
    (model / "model.safetensors").write_bytes(b"two")
    with pytest.raises(StateError, match=r"began with other weights \(got \w+ in '.*model', they had \w+\)"):
        sweep().run(lambda: FakePool(better_second))


def test_two_sweeps_that_were_made_at_once_run_nothing_twice(tmp_path: Path) -> None:
    first, second = sweep_in(tmp_path), sweep_in(tmp_path)
    assert first.run(lambda: FakePool(better_second)) == 0
    pool = FakePool(better_second)
    assert second.run(lambda: pool) == 0
    assert not pool.order


def test_a_point_where_curves_cross_runs_once(tmp_path: Path) -> None:
    curve = "{vary: rank, values: [4, 8], methods: [none], seeds: [0]}"
    text = PLAN + f"curves:\n  one: {curve}\n  two: {curve.replace('[4, 8]', '[8, 16]')}\n"
    (tmp_path / "plan.yaml").write_text(text)
    sweep, pool = Sweep(load_plan(tmp_path / "plan.yaml"), text, tmp_path / "out"), FakePool(better_second)
    assert sweep.run(lambda: pool) == 0
    assert len(pool.order) == len(set(pool.order)) == 8 + 4 + 3
