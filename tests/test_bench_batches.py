"""``hiddenkey bench batches``: every row is checked, a wrong result is found out, simulated ranks are counted right."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from hiddenkey_rs import masks
from hiddenkey_rs.benchmarks import (
    batches,
    batches_collate,
    batches_memory,
    batches_order,
    batches_pack,
    batches_spread,
    batches_training,
    harness,
)
from hiddenkey_rs.cli.main import main
from hiddenkey_rs.loading.collator import Collator
from hiddenkey_rs.loading.sampler import BatchSampler

pytest.importorskip("trl", reason="the peers of packing need the extra trl")
PLACE = {"cpu": "x", "simd": "y", "versions": {}}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SAMPLES", 1)
    monkeypatch.setattr(harness, "_MOST_ROUNDS", 1)


def test_collating_is_compared_with_the_lists(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(harness.run(batches_collate.cases(4, ((2, 9),)), PLACE))
    assert {row.case for row in rows} == {"collate, padded", "collate, flat"}
    assert all(row.checked and row.speedup for row in rows)
    call = Collator.__call__

    def off_by_one(self: Collator, batch: Any) -> dict[str, Any]:
        return {**(found := call(self, batch)), "labels": found["labels"] + (found["labels"] >= 0)}

    monkeypatch.setattr(Collator, "__call__", off_by_one)
    assert not any(row.checked for row in harness.run(batches_collate.cases(4, ((2, 9),)), PLACE))


def test_a_packing_that_loses_a_document_is_found_out() -> None:
    lengths = np.array([3, 4, 2000, 60])
    packing = batches_pack.pack(lengths, batches_pack.CAPACITY)
    assert batches_pack._right(packing, lengths)
    assert not batches_pack._right(packing, np.array([3, 4, 2000, 60, 1]))
    assert not batches_pack._right(packing, np.array([3, 400, 2000, 60]))


def test_packing_orders_and_memory_are_measured(small: None) -> None:
    cases = [*batches_pack.cases((2000,)), *batches_order.cases((10**5, 10**12), 300)]
    rows = list(harness.run(cases, PLACE))
    assert [row.case for row in rows] == ["pack into 2048", "seek", "seek", "an epoch of micro-batches"]
    assert all(row.checked for row in rows)
    assert next(batches_pack.a_document(rows, PLACE)).ours["median"] == pytest.approx(500 * rows[0].ours["median"])
    assert next(batches_memory.rows(100, PLACE)).ours["n"] == 1


def test_padding_is_counted() -> None:
    parts = iter([np.array([4, 2]), np.array([5])])
    assert batches_spread._waste(parts) == pytest.approx(100 * 2 / 13)
    rows = list(batches_spread.rows((512,), PLACE))
    assert all(row.checked for row in rows)
    assert rows[0].ours["median"] < rows[0].peer["median"] < rows[1].peer["median"]


def test_loads_of_ranks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_spread, "glue_lengths", lambda size: np.arange(size) % 40 + 1)
    rows = list(batches_spread.simulate([4], PLACE, size=20_000, each=512))
    assert all(row.checked for row in rows)
    heaviest = next(row for row in rows if row.case == batches_spread.HEAVIEST)
    assert 1 <= heaviest.ours["median"] < heaviest.peer["median"]
    # the same by the samplers themselves
    lengths = np.arange(20_000) % 40 + 1
    samplers = [BatchSampler(lengths, token_budget=2048, world_size=4, rank=rank) for rank in range(4)]
    loads = np.array([[len(rows) * max(lengths[rows]) for rows in sampler] for sampler in samplers]).T
    assert np.median(loads.max(axis=1) / loads.mean(axis=1)) == pytest.approx(heaviest.ours["median"])


def test_a_run_is_timed_from_loader_to_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = batches_training.Shape("encoder", layers=1, hidden=32, heads=2, vocab=30_000, length=128, batch=32)
    monkeypatch.setattr(batches_training, "_MINILM", tiny)
    monkeypatch.setattr(batches_training, "_WORKERS", (0,))
    threads = torch.get_num_threads(), masks.get_num_threads()
    rows = list(batches_training.rows(2, 1, PLACE))
    assert (torch.get_num_threads(), masks.get_num_threads()) == threads
    assert [row.case for row in rows] == ["waiting for data", "an example of a run"]
    assert all(row.checked for row in rows)
    assert [row.ours["n"] for row in rows] == [2, 1]  # a share a step; all seconds over all examples
    assert 0 < rows[0].ours["median"] < 100


def test_tables_and_picture(tmp_path: Any, small: None) -> None:
    rows = list(harness.run(batches_collate.cases(4, ((2, 9),)), PLACE))
    assert len(batches.tables(rows)[0]) == len(rows)
    batches.plot(rows, str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_that_are_none_are_refused() -> None:
    command = [sys.executable, "-m", "hiddenkey_rs", "bench", "batches", "--simulate-ranks", "64,0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ranks are numbers in 1..=8192" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "8"], "unrecognized arguments: --threads 8"),
        (["--quick", "--simulate-ranks", "4"], "ranks are simulated at one size (got --quick"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags: list[str], message: str, capsys) -> None:
    assert main(["bench", "batches", *flags]) == 2
    assert message in capsys.readouterr().err
