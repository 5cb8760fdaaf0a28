"""Benchmarks: rows hold what is documented, a wrong result is never timed, and goals are told honestly."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hiddenkey_rs import StateError, masks
from hiddenkey_rs.benchmarks import harness, machine
from hiddenkey_rs.benchmarks import masks as bench
from hiddenkey_rs.benchmarks.harness import Case, Entrant, Goal, Pair, Row
from hiddenkey_rs.cli.main import main

TINY = bench.Sizes(exponents=(8, 12), structured=(2, 3, 40), layers=2, hidden=(2, 3, 160))
KEYS = {"bench", "case", "sizes", "threads", "device", "simd", "unit", "ours", "peer", "speedup", "goal", "met"}
KEYS |= {"checked", "versions", "cpu", "commit"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", TINY)
    monkeypatch.setattr(harness, "_SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(harness, "_TURN_SECONDS", 1e-4)
    monkeypatch.setattr(harness, "_MOST_ROUNDS", 7)


def quick(*flags: str) -> int:
    return main(["bench", "masks", "--quick", *flags])


def test_rows_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, picture = tmp_path / "masks.jsonl", tmp_path / "masks.png"
    before = masks.get_num_threads()
    assert quick("--json", str(lines), "--plot", str(picture), "--threads", "1", "2") == 0
    assert masks.get_num_threads() == before
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    for row in rows:
        assert set(row) == KEYS
        assert row["checked"] is True
        assert (row["goal"] is None) == (row["met"] is None)
        assert {"python", "numpy", "torch", "hiddenkey_rs"} <= set(row["versions"])
        assert row["simd"] == masks.engine()["simd"]
        for part in (row["ours"], row["peer"]):
            assert 0 < part["p10"] <= part["median"] <= part["p90"]
            assert part["n"] >= (1 if row["unit"] == "KiB" else harness.SAMPLES)
        assert row["speedup"] == pytest.approx(row["peer"]["median"] / row["ours"]["median"])
    cases = {row["case"] for row in rows}
    for expected in (
        *(f"element, {form}" for form in ("packed", "as bool")),
        *(f"{pattern}, {form}" for pattern in ("column", "span") for form in ("packed", "as bool")),
        *(f"{what}, {pattern}" for what in ("plan", "memory of a plan") for pattern in ("column", "span")),
        *(f"dropout {dtype}, {way}" for dtype in ("float32", "bfloat16") for way in ("forward", "backward")),
        "a call of 64 decisions",
        "2 threads against 1",
        bench.LINEAR,
    ):
        assert expected in cases
    peers = {row["peer"]["name"] for row in rows if row["case"] == "element, packed"}
    assert {"torch bernoulli_", "torch.rand < p", "numpy SFC64 < p", "numpy Philox < p"} <= peers
    assert {row["threads"] for row in rows} == {1, 2}
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "element, packed" in printed.out
    assert "numpy SFC64 < p" in printed.out
    assert "every result was checked before it was timed" in printed.out
    assert "masks: plan, column" in printed.err
    assert quick("--json", str(lines), "--threads", "1") == 0
    assert len(lines.read_text().splitlines()) > len(rows), "rows are appended"


@pytest.mark.parametrize("broken", ["element", "element_bool", "column", "span", "drop_elements", "drop_rows", "plan"])
def test_a_wrong_result_exits_1(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    _break(broken, monkeypatch)
    lines = tmp_path / "masks.jsonl"
    assert quick("--threads", "1", "--json", str(lines)) == 1
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    wrong = [row for row in rows if not row["checked"]]
    assert wrong
    assert len(wrong) < len(rows)
    for row in wrong:
        assert row["speedup"] is None
        assert not row["met"]
    printed = capsys.readouterr()
    assert "check failed" in printed.err
    assert "UNCHECKED" in printed.out
    assert f"{len(wrong)} row(s) whose result was not found right" in printed.out


def _break(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one path flip a single decision."""
    from hiddenkey_rs import ops, plan

    if name == "plan":
        whole = plan.StepPlan.kept

        def kept(self, layer: int, site: str):
            counts = whole(self, layer, site).copy()
            counts[0, 0] += 1
            return counts

        monkeypatch.setattr(plan.StepPlan, "kept", kept)
        return
    module = ops if name.startswith("drop") else masks
    real = getattr(module, name)

    def flipped(*arguments, **named):
        found = real(*arguments, **named)
        if name == "element_bool":
            found[..., -1, -1] ^= True
        elif name == "drop_elements":
            found[0][-1, -1] += 1
        elif name == "drop_rows":
            found[-1, -1] += 1
        else:
            found.words[..., -1, -1] ^= 1
        return found

    monkeypatch.setattr(module, name, flipped)


def case(*entrants: Entrant, goal: Goal | None = None) -> Case:
    pairs = [Pair("one", entrants[0].name, peer.name, goal) for peer in entrants[1:]]
    return Case("made", {"size": 3}, "ms", 1e3, 1, entrants, pairs, budget=0.0)


def sleeper(name: str, seconds: float, right: bool = True) -> Entrant:
    return Entrant(name, lambda: time.sleep(seconds), lambda: right)


def test_figures_and_goals() -> None:
    rows = [
        next(harness.run([case(sleeper("ours", 0.001), sleeper("theirs", 0.004), goal=goal)], {}))
        for goal in (Goal("speedup", 2), Goal("speedup", 20), Goal("median", 3.9), Goal("median", 0.9))
    ]
    assert [row.met for row in rows] == [True, False, True, False]
    for row in rows:
        assert 1 <= row.ours["median"] < 3.9 < row.peer["median"], "milliseconds"
        assert row.speedup is not None
        assert row.speedup > 1
    assert rows[1].cells()["met"] == "NO"
    assert rows[0].to_dict()["goal"] == "speedup >= 2"


def test_entrants_alternate_and_the_slow_bystander_is_spared() -> None:
    calls: list[str] = []

    def noted(name: str, seconds: float) -> Entrant:
        return Entrant(name, lambda: (calls.append(name), time.sleep(seconds)), lambda: True)

    found = harness.measure([noted("a", 0.002), noted("b", 0.002), noted("slow", 0.11)], {"a", "b"}, budget=0.0)
    assert len(found["a"]) >= harness.SAMPLES
    assert len(found["b"]) >= harness.SAMPLES
    assert len(found["slow"]) == harness.SLOW_SAMPLES
    assert "".join(calls).count("ab") >= harness.SAMPLES


def test_what_was_not_found_right_is_not_called_again(capsys: pytest.CaptureFixture[str]) -> None:
    def never() -> None:
        raise AssertionError("a wrong call was timed")

    def fails() -> bool:
        raise ValueError("no such mask")

    good, bad = sleeper("ours", 0.0), Entrant("theirs", never, fails)
    [row, other] = harness.run([case(good, bad, sleeper("third", 0.0))], {})
    assert not row.checked
    assert row.peer["median"] is None
    assert row.cells()["met"] == "UNCHECKED"
    assert other.checked
    assert "check failed: theirs: ValueError: no such mask" in capsys.readouterr().err


def test_a_debug_build_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = {**masks.engine(), "build": "debug"}
    monkeypatch.setattr(masks, "engine", lambda: engine)
    with pytest.raises(StateError, match=r"only a release build is worth timing \(got a debug build\)"):
        harness.about()
    assert quick() == 2
    assert capsys.readouterr().out == ""


def test_linearity_leaves_a_calls_own_cost_aside() -> None:
    def row(name: str, decisions: int, median: float) -> Row:
        part = {"median": median, "p10": median, "p90": median, "n": 7}
        return Row("masks", name, {"decisions": decisions}, 1, "", part, {"name": "torch bernoulli_", **part})

    call = row("a call of 64 decisions", 64, 2.0)  # microseconds
    straight = [row("element, packed", size, 0.1 + 2000 / size) for size in (1 << 12, 1 << 20)]
    bent = [*straight, row("element, packed", 1 << 24, 0.4)]
    for rows, met in ((straight, True), (bent, False)):
        last = list(bench.derived([call, *rows], TINY, {}))[-1]
        assert last.case == bench.LINEAR
        assert last.met is met


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "0"], "threads must lie in 1..=1024 (got 0)"),
        (["--threads", "x"], "argument --threads: invalid int value: 'x'"),
        (["--json", "{tmp}"], "the file cannot be written (got"),
        (["--plot", "{tmp}/none/masks.png"], "the file cannot be written (got"),
        (["--plot", "{tmp}/masks.txt"], "let the name end in .png"),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick(*(flag.format(tmp=tmp_path) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("hiddenkey: error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_bench_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert main(["bench", "nothing"]) == 2
    assert "BENCH" in capsys.readouterr().err


def test_the_machine_is_named() -> None:
    assert machine.processor()
    assert machine.versions(("numpy", "no-such-package")).keys() == {"python", "numpy"}
    found = machine.commit()
    assert found is None or len(found.removesuffix("-dirty")) == 40
