"""``hiddenkey bench attention``: rows and tables, results compared before they are timed, crossovers, goals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hiddenkey_rs import masks, ops
from hiddenkey_rs.benchmarks import attention, attention_tables, harness
from hiddenkey_rs.benchmarks.attention import Series, Sizes
from hiddenkey_rs.benchmarks.attention_paths import (
    BLOCKED,
    BOOLEAN,
    DENSE,
    DROPOUT,
    GATHERED,
    PATHS,
    PLAIN,
    Layout,
    Work,
)
from hiddenkey_rs.benchmarks.harness import Row
from hiddenkey_rs.cli.main import main

PEERS = (PLAIN, BOOLEAN, DROPOUT, DENSE)
TINY = Sizes(
    96,
    (
        Series(Layout(3, 3, 8), (6, 48), (0.1, 0.3), GATHERED, PEERS),
        Series(Layout(4, 2, 8), (48,), (0.3,), GATHERED, (PLAIN, BOOLEAN)),
        Series(Layout(2, 2, 8, pattern="span"), (48,), (0.3,), GATHERED, (PLAIN, BOOLEAN)),
        Series(Layout(2, 2, 8, causal=True), (48,), (0.3,), BLOCKED, (PLAIN, DENSE)),
    ),
)
KEYS = {"bench", "case", "sizes", "threads", "device", "simd", "unit", "ours", "peer", "speedup", "goal", "met"}
KEYS |= {"checked", "versions", "cpu", "commit"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUICK", TINY)
    monkeypatch.setattr(harness, "_SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(harness, "_TURN_SECONDS", 1e-4)
    monkeypatch.setattr(harness, "_MOST_ROUNDS", 7)


def quick(*flags: str) -> int:
    return main(["bench", "attention", "--quick", "--threads", "1", *flags])


def test_rows_tables_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, picture = tmp_path / "attention.jsonl", tmp_path / "attention.png"
    threads = masks.get_num_threads()
    assert quick("--json", str(lines), "--plot", str(picture)) == 0
    assert masks.get_num_threads() == threads
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    for row in rows:
        assert set(row) == KEYS
        assert row["bench"] == "attention"
        assert row["device"] == "cpu"
        assert row["checked"] is True
        assert (row["goal"] is None) == (row["met"] is None)
        assert {"length", "batch", "heads", "kv_heads", "head_size", "rate", "dtype"} <= set(row["sizes"])
        assert row["sizes"]["length"] * row["sizes"]["batch"] == 96
        assert row["speedup"] == pytest.approx(row["peer"]["median"] / row["ours"]["median"])
    for rate in (0.1, 0.3):
        for length in (6, 48):
            mine = [r for r in rows if r["sizes"]["rate"] == rate and r["sizes"]["length"] == length]
            assert {r["peer"]["name"] for r in mine if r["case"] == "column DropKey"} == set(PEERS)
            assert any(r["case"] == "column DropKey, not gathered" for r in mine)
    assert {row["case"] for row in rows} >= {"span DropKey", "growth from L 6"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "ms, column DropKey, 3x8, float32, 1 thread(s)  L 6" in printed
    assert "of SDPA, column DropKey, 3x8, float32" in printed
    assert "boolean row 0.3" in printed
    assert "against a boolean row mask" in printed
    assert "every result was checked before it was timed" in printed


@pytest.mark.parametrize("broken", ["output", "gradient"])
def test_a_wrong_result_exits_1(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    real = ops.dropped_attention

    def wrong(query, *arguments, impl, **named):
        output, *counts = real(query, *arguments, impl=impl, **named)
        if impl == "compact" and broken == "output":
            output = output * 1.01
        if impl == "compact" and broken == "gradient":
            extra = 0.01 * query
            output = output + extra - extra.detach()
        return output, *counts

    monkeypatch.setattr(ops, "dropped_attention", wrong)
    lines = tmp_path / "attention.jsonl"
    assert quick("--json", str(lines)) == 1
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    right = [row for row in rows if row["checked"]]
    assert {row["case"].rpartition(", ")[2] for row in right} == {"not gathered", "causal"}
    assert len(right) < len(rows)
    printed = capsys.readouterr()
    assert "check failed: gathered: its result differs from the reference" in printed.err
    assert "UNCHECKED" in printed.out


@pytest.mark.parametrize("layout", [Layout(4, 2, 8), Layout(4, 4, 8, pattern="span"), Layout(2, 2, 8, causal=True)])
def test_the_reference_in_pieces_is_the_reference(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    from hiddenkey_rs.benchmarks import attention_paths

    work = Work(layout, 3, 20, torch.float32, "cpu")
    whole = work.reference(0.3, 5)
    monkeypatch.setattr(attention_paths, "_REFERENCE_PAIRS", 500)
    for one, other in zip(work.reference(0.3, 5), whole, strict=True):
        torch.testing.assert_close(one, other)
    for path in (DENSE, BOOLEAN):
        for one, other in zip(PATHS[path](work, 0.3, 5), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert work.query.transpose(1, 2).is_contiguous(), "as a model's projections leave it"


def test_dropout_that_does_not_drop_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(Layout(2, 2, 8), 2, 16, torch.float32, "cpu")
    assert attention._drops_at(work, 0.3)
    monkeypatch.setitem(PATHS, DROPOUT, PATHS[PLAIN])
    assert not attention._drops_at(work, 0.3)


def row(length: int, ours: float, boolean: float, plain: float = 1.0, rate: float = 0.1) -> list[Row]:
    sizes = {"length": length, "batch": 1, "heads": 2, "kv_heads": 2, "head_size": 8, "rate": rate, "dtype": "float32"}
    sizes["impl"] = GATHERED

    def part(median: float, **name: str) -> dict:
        return {**name, "median": median, "p10": median, "p90": median, "n": 7}

    return [
        Row("attention", "column DropKey", sizes, 1, "ms", part(ours), part(plain, name=PLAIN)),
        Row("attention", "column DropKey", sizes, 1, "ms", part(ours), part(boolean, name=BOOLEAN), first=False),
    ]


def test_thread_counts_have_tables_of_their_own() -> None:
    rows = [
        replace(one, threads=threads)
        for threads in (1, 2)
        for one in (*row(128, threads, 2.0), *row(256, threads, 2.0))
    ]
    assert [name.rsplit(", ", 1)[1] for name in attention_tables.layouts(rows)] == ["1 thread(s)", "2 thread(s)"]
    first, *others = attention_tables.tables(rows)
    assert [line["threads"] for line in first] == ["1", "1", "2", "2"]
    assert [table[0]["L 128"] for table in others] == ["1.00", "1.00", "2.00", "2.00"]


def test_crossover_and_growth() -> None:
    rows = [*row(128, 3.0, 2.0), *row(256, 1.9, 2.0), *row(512, 2.1, 2.0), *row(1024, 1.5, 2.0, plain=2.0)]
    [sentence] = attention_tables.crossovers(rows)
    assert "pays from L 1024 on" in sentence
    [sentence] = attention_tables.crossovers(row(128, 3.0, 2.0))
    assert "does not pay up to L 128" in sentence
    rows = [*row(128, 1.0, 2.0), *row(1024, 4.0, 2.0, plain=2.0)]
    for one in rows:
        one.sizes["batch"] = 1024 // one.sizes["length"]
    [grown] = attention.growth(rows, {})
    assert (grown.ours["median"], grown.peer["median"], grown.met) == (4.0, 2.0, False)


def test_goals_of_the_issue() -> None:
    column = attention.WHOLE.series[0]
    found = {
        (length, rate): [1 / goal.bound for goal in attention._goals(attention.WHOLE, column, length, rate).values()]
        for length in column.lengths
        for rate in column.rates
    }
    assert {key: bound for key, bound in found.items() if bound} == {
        (512, 0.1): [pytest.approx(0.93)],
        (512, 0.3): [pytest.approx(0.80)],
        **{(length, 0.1): [pytest.approx(0.90)] for length in (2048, 4096)},
        **{(length, 0.3): [pytest.approx(0.75)] for length in (2048, 4096)},
    }
    element = next(series for series in attention.CUDA.series if series.layout.pattern == "element")
    goals = attention._goals(attention.CUDA, element, 2048, 0.1)
    assert sorted(1 / goal.bound for goal in goals.values()) == pytest.approx([1.05, 1.30])


def test_no_cuda_is_bad_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for bench in ("attention", "step"):
        assert main(["bench", bench, "--device", "cuda"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("hiddenkey: error: this machine has no CUDA device")
        assert len(error.splitlines()) == 1
