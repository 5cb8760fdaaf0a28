"""How a run is spread over processes: micro-batches follow from the rows of a step, which stay."""

from __future__ import annotations

import pytest

import hiddenkey_rs as hk
from hiddenkey_rs.experiments.run_config import RunConfig
from hiddenkey_rs.experiments.spread import Spread


def config(**choices: object) -> RunConfig:
    return RunConfig(task="demo", **choices)


@pytest.mark.parametrize(
    ("choices", "processes", "expected"),
    [
        ({"batch_size": 8}, 1, Spread(1, 1, 8, "stock")),
        ({"batch_size": 8, "accumulation": 3}, 2, Spread(2, 3, 48, "hiddenkey")),
        ({"batch_size": 8, "loader": "hiddenkey"}, 1, Spread(1, 1, 8, "hiddenkey")),
        ({"batch_size": 8, "loader": "stock"}, 2, Spread(2, 1, 16, "stock")),
        ({"token_budget": 99, "accumulation": 2}, 1, Spread(1, 2, None, "hiddenkey")),
    ],
)
def test_a_new_run(choices: dict[str, object], processes: int, expected: Spread) -> None:
    spread = Spread.of(config(**choices), processes)
    assert spread == expected
    assert Spread.from_dict(spread.to_dict()) == spread


@pytest.mark.parametrize(
    ("before", "processes", "accumulation"),
    [(2, 1, 2), (1, 2, 1), (2, 3, 1), (4, 3, 2), (4, 1, 4), (3, 2, 2), (2, 2, 1), (8, 3, 3)],
)
def test_the_same_flags_on_other_processes(before: int, processes: int, accumulation: int) -> None:
    flags = config(batch_size=8, loader="hiddenkey")
    spread = Spread.of(flags, before).again(flags, flags, processes)
    assert (spread.processes, spread.accumulation, spread.rows) == (processes, accumulation, 8 * before)


def test_token_budgets_keep_the_number_of_micro_batches() -> None:
    flags = config(token_budget=99, accumulation=3)
    assert Spread.of(flags, 2).again(flags, flags, 4) == Spread(4, 2, None, "hiddenkey")


def test_other_flags() -> None:
    flags = config(batch_size=8, accumulation=2, loader="hiddenkey")
    run = Spread.of(flags, 2)
    other = config(batch_size=4, accumulation=8)
    assert run.again(other, flags, 1) == Spread(1, 8, 32, "hiddenkey")
    with pytest.raises(hk.StateError, match=r"takes steps of 32 rows \(got 2 process\(es\) of 8 x 4 = 64\)"):
        run.again(other, flags, 2)
    with pytest.raises(hk.StateError, match=r"another loader \(got --loader stock, the run has hiddenkey\)"):
        run.again(config(loader="stock"), flags, 2)
    stock = Spread.of(config(batch_size=8), 1)
    with pytest.raises(hk.StateError, match=r"\(got 2 process\(es\) of 1 x 8 rows, the run has 1 of 1 x 8\)"):
        stock.again(config(batch_size=8), config(batch_size=8), 2)
