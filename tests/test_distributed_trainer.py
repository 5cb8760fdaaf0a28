"""The Trainer on 1, 2 and 4 ranks (gloo): the same training however it is spread, resumed on other ranks, errors on all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distributed_work as work
import ranks
from hiddenkey_rs.train import Loader

pytestmark = pytest.mark.distributed

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
LOSSES = ("loss", "task_loss", "consistency_loss")


def spread(spec: dict[str, Any], world: int, accumulation: int, rows: int = 8, **arguments: Any) -> dict[str, Any]:
    """``spec`` with its 8 rows of a step on so many ranks and micro-batches."""
    sizes = {
        "per_device_train_batch_size": max(1, rows // world // accumulation),
        "gradient_accumulation_steps": accumulation,
    }
    return {**spec, "arguments": {**spec.get("arguments", {}), **sizes, **arguments}}


def compare(found: list[Any], expected: Any, tolerance: float) -> None:
    """The same samples with the same masks at every step, the same logs on all ranks, the same weights in the end."""
    drawn = {place: mask for rank in found for place, mask in rank["drawn"].items()}
    assert sum(len(rank["drawn"]) for rank in found) == len(drawn), "a sample was trained on twice"
    assert drawn == expected["drawn"]
    assert all(rank["logged"] == found[0]["logged"] for rank in found)
    assert len(found[0]["logged"]) == len(expected["logged"])
    for mine, theirs in zip(found[0]["logged"], expected["logged"], strict=True):
        for name in LOSSES:
            assert mine[name] == pytest.approx(theirs[name], abs=tolerance), (mine["step"], name)
        assert mine["realised_rate_ffn"] == theirs["realised_rate_ffn"]
    for rank in found:
        for name, value in expected["weights"].items():
            np.testing.assert_allclose(rank["weights"][name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("branches", ["one", "both"])
def test_the_same_training_however_it_is_spread(family: str, branches: str, tmp_path: Path) -> None:
    """21 rows in steps of 8: the last step's 5 rows leave slots of 4 x 2 empty. Tokens are uneven, and count exactly."""
    config = work.CONFIG if branches == "one" else work.BOTH
    spec = {"out": str(tmp_path), "family": family, "rows": 21, "config": config}
    expected = ranks.run(1, work.train, spread(spec, 1, 1))[0]
    assert max(entry["consistency_loss"] for entry in expected["logged"]) > 5e-3
    compare(ranks.run(4, work.train, spread(spec, 4, 2)), expected, 2e-6)
    as_list = {**spec, "store": False}
    averaged = spread(as_list, 2, 2, activation_checkpointing=True, average_tokens_across_devices=False)
    compare(ranks.run(2, work.train, averaged), expected, 2e-6)


def test_token_budgets_and_bfloat16(tmp_path: Path) -> None:
    spec = {"out": str(tmp_path), "family": "llama", "rows": 37, "loader": Loader(token_budget=40)}
    expected = ranks.run(1, work.train, spread(spec, 1, 1, max_steps=12))[0]
    steps = {step: 0 for step, _, _ in expected["drawn"]}
    for step, _, _ in expected["drawn"]:
        steps[step] += 1
    assert len(set(steps.values())) > 1, "as many rows as the budget allows"
    compare(ranks.run(2, work.train, spread(spec, 2, 3, max_steps=12)), expected, 2e-6)
    half = ranks.run(2, work.train, spread(spec, 2, 1, max_steps=12, bf16=True))
    compare(half, ranks.run(1, work.train, spread(spec, 1, 1, max_steps=12, bf16=True))[0], 0.01)
    compare(half, {**expected, "weights": half[0]["weights"]}, 0.01)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.slow
def test_fsdp_by_the_trainer(family: str, tmp_path: Path) -> None:
    spec = {"out": str(tmp_path), "family": family, "rows": 21}
    layer = {"bert": "BertLayer", "llama": "LlamaDecoderLayer"}[family]
    settings = {**FSDP["fsdp_config"], "transformer_layer_cls_to_wrap": layer}
    expected = ranks.run(1, work.train, spread(spec, 1, 1))[0]
    own = {**settings, "activation_checkpointing": True}
    compare(ranks.run(2, work.train, spread(spec, 2, 4, fsdp=True, fsdp_config=own)), expected, 2e-6)
    settings |= {"reshard_after_forward": False}
    both = {**spec, "config": work.BOTH}
    expected = ranks.run(1, work.train, spread(both, 1, 1))[0]
    compare(ranks.run(4, work.train, spread(both, 4, 1, fsdp=True, fsdp_config=settings)), expected, 2e-6)


@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 3)), ((1, 2), (2, 2))])
@pytest.mark.slow
def test_killed_on_some_ranks_and_resumed_on_others(before: Any, after: Any, tmp_path: Path) -> None:
    """SIGKILL at step 23 of 60, resumed from step 20: the loss curve of the undisturbed run, to the reduction's rounding."""
    spec = {"out": str(tmp_path / "whole"), "family": "llama", "rows": 37, "loader": Loader(batch_size=8)}
    long = {
        "max_steps": 60,
        "save_strategy": "steps",
        "save_steps": 10,
        "save_total_limit": 2,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,
    }
    expected = ranks.run(1, work.train, spread(spec, 1, 1, **long))[0]
    cut = {**spec, "out": str(tmp_path / "cut")}
    killed = ranks.finish(
        ranks.start(before[0], work.train, {**spread(cut, *before, **long), "kill_at": 23}), timeout=60
    )
    assert all(isinstance(rank, ranks.Failure) for rank in killed)
    assert ranks.Failure("exit", "-9") in killed
    found = ranks.run(after[0], work.train, {**spread(cut, *after, **long), "resume": True})
    expected["drawn"] = {place: mask for place, mask in expected["drawn"].items() if place[0] >= 20}
    compare(found, expected, 1e-4)  # Adam makes much of little, the more the smaller its epsilon
    curves = [[entry["loss"] for entry in run["logged"]] for run in (found[0], expected)]
    assert len(curves[0]) == 60
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_other_ranks(tmp_path: Path) -> None:
    spec = {"out": str(tmp_path / "whole"), "family": "llama", "rows": 21}
    long = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "adam_epsilon": 1e-3}
    expected = ranks.run(1, work.train, spread(spec, 1, 1, **long))[0]
    cut = {**spec, "out": str(tmp_path / "cut")}
    ranks.finish(ranks.start(2, work.train, {**spread(cut, 2, 1, **long, **FSDP), "kill_at": 5}), timeout=60)
    found = ranks.run(4, work.train, {**spread(cut, 4, 1, **long, **FSDP), "resume": True})
    expected["drawn"] = {place: mask for place, mask in expected["drawn"].items() if place[0] >= 3}
    compare(found, expected, 1e-4)


OTHER = {
    "data": ({"data": work.rows("bert", 24, seed=4)}, "DataError", "differ in their data (got"),
    "spots": ({"data": work.rows("bert", 24, seed=4), "store": False}, "DataError", "differ in their data (got"),
    "size": ({"rows": 23}, "DataError", "differ in their data set's size (got 23 on rank 1, 24 on rank 0)"),
    "config": ({"config": work.BOTH}, "StateError", "differ in their config consistency (got"),
    "seed": ({"arguments": {"seed": 5}}, "StateError", "differ in their argument seed (got 5 on rank 1, 1 on rank 0)"),
    "weights": ({"model_seed": 3}, "StateError", "differ in their weights (got"),
    "loader": ({"loader": Loader(window=8)}, "StateError", "differ in their loader (got"),
    "checkpoint": ({"resume": "nowhere"}, "StateError", "the checkpoint lacks state (got 'nowhere'"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_rank_that_trains_something_else_is_told_on_every_rank(what: str, tmp_path: Path) -> None:
    other, kind, message = OTHER[what]
    spec = {"out": str(tmp_path), "store": other.get("store", True)}
    started = ranks.start(2, work.train_as, [spec, {**spec, **other}])
    clock = time.monotonic()
    found = ranks.finish(started, timeout=60)
    for rank in found:
        assert (rank.kind, message in rank.text) == (kind, True), rank
    assert time.monotonic() - clock < 30, "10 s on a machine of its own"


def test_uneven_streams_end_instead_of_hanging(tmp_path: Path) -> None:
    for rank in ranks.finish(ranks.start(2, work.train_uneven, {"out": str(tmp_path)}), timeout=60):
        assert rank.kind == "DataError"
        assert "unequal numbers of micro-batches (got 0 on rank 1 and 1 elsewhere in step 2)" in rank.text


def test_a_lost_rank_is_noticed() -> None:
    """Rank 1 stops without a word in a long wait of rank 0: no connection breaks, only signs of life are missing."""
    started = ranks.start(2, work.silent)
    clock = time.monotonic()
    try:
        assert ranks.finish(started[:1], timeout=60) == [ranks.Failure("exit", "1")]
    finally:
        ranks.finish(started[1:], timeout=0)
    assert time.monotonic() - clock < 40


def test_ranks_that_launch_apart_are_refused(tmp_path: Path) -> None:
    """accelerate takes every process for the only one where CPUs are not asked for."""
    spec = {"out": str(tmp_path), "arguments": {"use_cpu": False}}
    for rank in ranks.finish(ranks.start(2, work.train, spec), timeout=60):
        assert rank.kind == "ConfigError"
        assert "would train by itself (got 2 process(es) from the launcher and 1 in accelerate)" in rank.text
    unsharded = {"out": str(tmp_path), "arguments": FSDP, "patched": False}
    for rank in ranks.finish(ranks.start(2, work.train, unsharded), timeout=60):
        assert rank.kind == "ConfigError"
        assert "it would train without FSDP (got device 'cpu', 2 process(es))" in rank.text


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_fine_tuning(packing: bool, tmp_path: Path) -> None:
    """Packed, there are fewer rows than ranks: some have a padding row in every step."""
    pytest.importorskip("trl")
    spec = {"out": str(tmp_path), "packing": packing}
    [expected] = ranks.run(1, work.fine_tune, spec)
    found = ranks.run(4, work.fine_tune, spec)
    assert len(expected) == 3
    for rank in found:
        for mine, theirs in zip(rank, expected, strict=True):
            assert mine == pytest.approx(theirs, abs=5e-6)
