"""What goes wrong in fine-tuning with TRL's and transformers' defaults, each with a test that it does not here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch

pytest.importorskip("trl", reason="the SFT trainer needs TRL")

import hiddenkey_rs as hk
import ranks
import sft_cases as cases

BOTH = hk.HiddenKeyConfig(
    hk.AttentionDrop(rate=0.3), hk.HiddenDrop(rate=0.3), consistency=hk.Consistency(gradient="both"), layers="all"
)
ONCE = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.3), hk.HiddenDrop(rate=0.3), consistency=None, layers="all")
PACKED = {"packing": True, "packing_strategy": "bfd"}
WRAPPED = {"packing": True, "packing_strategy": "wrapped"}


def attention_calls(run: Any) -> list[bool]:
    """One entry a call of the first layer's attention: whether it ran with gradient."""
    found: list[bool] = []
    layer = run.model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: found.append(torch.is_grad_enabled()))
    return found


@pytest.mark.parametrize(
    ("config", "expected"),
    [(ONCE, [True]), (cases.CONFIG, [False, True]), (BOTH, [True]), (cases.STILL, [True])],
    ids=["one pass", "two passes", "both branches at once", "nothing dropped"],
)
def test_no_pass_is_run_for_metrics(config: Any, expected: list[bool], tmp_path: Path) -> None:
    """TRL runs the model once more, without gradient, where a loss of one's own or label smoothing is used."""
    own = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()}
    with pytest.warns(FutureWarning, match="extra forward pass"):
        trl = cases.stock(tmp_path, cases.texts(), max_steps=1, gradient_checkpointing=False, **own)
    calls = attention_calls(trl)
    trl.train()
    assert calls == [True, False], "TRL's own trainer has changed"
    for more in ({}, own, {"label_smoothing_factor": 0.1}):
        if more and config is BOTH:
            continue
        run = cases.trainer(tmp_path, cases.texts(), config=config, max_steps=1, gradient_checkpointing=False, **more)
        calls = attention_calls(run)
        run.train()
        assert calls == expected
        assert cases.logged(run, "entropy")[0] > 1


@pytest.mark.parametrize("layout", [{}, PACKED, WRAPPED], ids=["rows", "bfd", "wrapped"])
@pytest.mark.parametrize("config", [cases.CONFIG, BOTH], ids=["one", "both"])
def test_accumulation_changes_nothing_but_rounding(layout: Any, config: Any, tmp_path: Path) -> None:
    results = []
    for accumulation in (1, 2, 4):
        how = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
        how |= {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-2}
        run = cases.trainer(tmp_path, cases.texts(), config=config, **{**layout, **how})
        run.train()
        names = ("loss", "consistency_loss", "entropy", "num_tokens")
        results.append((run.model, [cases.logged(run, name) for name in names]))
    for model, logged in results[1:]:
        assert cases.furthest(model, results[0][0]) < 5e-7
        for one, two in zip(logged, results[0][1], strict=True):
            assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("layout", [{}, PACKED], ids=["rows", "bfd"])
def test_checkpointing_is_on_by_default_and_changes_nothing(layout: Any, tmp_path: Path) -> None:
    runs = []
    for how in ({}, {"gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        run = cases.trainer(tmp_path, cases.texts(), **layout, **how)
        run.model.enable_input_require_grads()
        calls = attention_calls(run)
        run.train()
        runs.append((run, len(calls)))
    assert runs[0][0].args.gradient_checkpointing
    assert runs[0][1] > runs[1][1], "nothing was computed twice"
    for run, _ in runs[1:]:
        assert cases.furthest(run.model, runs[0][0].model) == 0.0
        assert cases.logged(run) == cases.logged(runs[0][0])


def test_selective_checkpointing_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for how in ({}, {"gradient_checkpointing_kwargs": {"selective": True}}):
        run = cases.trainer(tmp_path, cases.texts(), **PACKED, **how)
        run.train()
        runs.append(run)
    assert cases.furthest(*(run.model for run in runs)) == 0.0


@pytest.mark.parametrize("config", [cases.CONFIG, BOTH], ids=["one", "both"])
def test_a_cache_does_not_let_documents_see_each_other(config: Any, tmp_path: Path) -> None:
    """With ``use_cache`` transformers drops the mask that keeps packed documents apart."""
    losses = []
    for how in ({"per_device_train_batch_size": 12}, PACKED):
        run = cases.trainer(
            tmp_path, cases.texts(), config=config, max_steps=1, use_cache=True, gradient_checkpointing=False, **how
        )
        assert run.model.config.use_cache
        run.train()
        losses.append(cases.logged(run)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_places_of_a_flat_row_reach_the_model(tmp_path: Path) -> None:
    """What FlashAttention needs is handed on, but not beside a doubled batch, which it does not describe."""
    seen = []
    for config in (ONCE, BOTH):
        run = cases.trainer(tmp_path, cases.texts(), config=config, max_steps=1, **PACKED)
        run.model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        run.train()
    plain, doubled = seen
    assert plain["cu_seq_lens_q"].tolist() == [0, *torch.tensor(lengths_of(plain)).cumsum(0).tolist()]
    assert plain["max_length_k"] == 12
    assert len(doubled["input_ids"]) == len(doubled["position_ids"]) == 2
    assert not {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} & doubled.keys()


def lengths_of(batch: dict[str, Any]) -> list[int]:
    places = batch["position_ids"][0].tolist()
    starts = [column for column, place in enumerate(places) if place == 0]
    return [end - start for start, end in zip(starts, [*starts[1:], len(places)], strict=True)]


@pytest.mark.parametrize("layout", [{}, PACKED], ids=["rows", "bfd"])
def test_resume_is_exact(layout: Any, tmp_path: Path) -> None:
    how = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
    how |= {"per_device_train_batch_size": 1, **layout}
    whole = cases.trainer(tmp_path / "a", cases.texts(), **how)
    whole.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    parts = cases.trainer(tmp_path / "b", cases.texts(), **how)
    parts.train(resume_from_checkpoint=True)
    assert cases.furthest(whole.model, parts.model) == 0.0
    for name in ("loss", "consistency_loss", "entropy"):
        tails = [[e[name] for e in run.state.log_history if "loss" in e and e["step"] > 2] for run in (whole, parts)]
        assert tails[0] == tails[1]
        assert len(tails[0]) == 2


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_and_generation_are_the_stock_models(packing: bool, tmp_path: Path) -> None:
    how = {"eval_dataset": cases.texts(8), "packing": packing, "per_device_eval_batch_size": 3}
    run = cases.trainer(tmp_path, cases.texts(), eval_strategy="steps", eval_steps=2, **how)
    trl = cases.stock(tmp_path, cases.texts(), **how)
    run.train()
    trl.model.load_state_dict(run.model.state_dict())
    expected, found = trl.evaluate(), run.evaluate()
    names = ["eval_loss", "eval_entropy", "eval_mean_token_accuracy"]
    assert [found[name] for name in names] == [expected[name] for name in names]
    during = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert during[0]["eval_loss"] == found["eval_loss"]
    prompt = torch.tensor([[5, 6, 7]])
    written = []
    for _ in ("attached", "detached"):
        for mode in (False, True):  # people forget to leave the training mode
            written.append(run.model.train(mode).generate(prompt, max_new_tokens=8, do_sample=False))
        run.handle.detach()
    assert torch.equal(written[0], trl.model.eval().generate(prompt, max_new_tokens=8, do_sample=False))
    assert torch.equal(written[0], written[2])
    assert torch.equal(written[1], written[3])


def test_a_refused_trainer_leaves_the_first_its_logs(tmp_path: Path) -> None:
    run = cases.trainer(tmp_path, cases.texts())
    with pytest.raises(hk.ConfigError):
        hk.HiddenKeySFTTrainer(run.model, run.args, None, cases.texts(), config=hk.HiddenKeyConfig(layers=[99]))
    run.train()
    assert cases.logged(run, "entropy")[0] > 1


def test_a_batch_without_tokens_that_carry_loss(tmp_path: Path) -> None:
    """Packed rows of prompts alone: a finite zero, no NaN that spoils the weights."""
    tokens = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 4]]
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": [[-100] * len(row) for row in tokens]})
    for config in (cases.CONFIG, BOTH):
        run = cases.trainer(tmp_path, data, config=config, max_steps=1, **PACKED)
        before = cases.weights(run.model)
        run.train()
        assert cases.logged(run) == [0.0]
        assert all(torch.equal(before[name], value) for name, value in cases.weights(run.model).items())


def test_the_default_precision(tmp_path: Path) -> None:
    """``SFTConfig`` asks for bfloat16 unless told otherwise."""
    run = cases.trainer(tmp_path, cases.texts(), bf16=None, **PACKED)
    assert run.args.bf16
    run.train()
    still = cases.trainer(tmp_path, cases.texts(), **PACKED)
    still.train()
    assert cases.logged(run) != cases.logged(still)
    assert cases.logged(run) == pytest.approx(cases.logged(still), rel=0.02)


@pytest.mark.parametrize("packing", [False, True])
def test_our_loader(packing: bool, tmp_path: Path) -> None:
    """``loader="hiddenkey"``: every document once an epoch, whatever the micro-batches."""
    results = []
    for accumulation in (1, 3):
        how = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 3 // accumulation}
        how |= {"max_steps": -1, "num_train_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0, "packing": packing}
        run = cases.trainer(tmp_path, cases.texts(11), loader="hiddenkey", **how)
        masks = cases.Masks(run)
        run.train()
        assert {key[-1] for key in masks} == set(range(11))
        results.append((masks, run))
    assert cases.same(*(masks for masks, _ in results))
    assert cases.furthest(*(run.model for _, run in results)) < 5e-7
    assert cases.logged(results[0][1], "num_tokens") == cases.logged(results[1][1], "num_tokens")


@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    """Every rank seeds torch alike; masks still differ by document, and the step is that of one process."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    layouts: list[dict[str, Any]] = [
        {"config": cases.CONFIG, **PACKED},
        {"config": BOTH, **PACKED, "peft_config": lora},
        {"config": cases.CONFIG},
    ]
    layouts = [{**layout, "train_sampling_strategy": "sequential"} for layout in layouts]
    one = cases.train_ranks(str(tmp_path), [{**layout, "per_device_train_batch_size": 4} for layout in layouts])
    halves = [{**layout, "per_device_train_batch_size": 2} for layout in layouts]
    two = ranks.run(2, cases.train_ranks, str(tmp_path), halves)
    for number in range(len(layouts)):
        alone, parts = one[number], [rank[number] for rank in two]
        # accelerate deals batches to ranks in turn: together they hold the rows of one process' batch
        together = {**parts[0]["masks"], **parts[1]["masks"]}
        assert together.keys() == alone["masks"].keys()
        assert all(np.array_equal(together[key], alone["masks"][key]) for key in together)
        assert parts[0]["masks"].keys().isdisjoint(parts[1]["masks"].keys())
        for name, value in alone["weights"].items():
            # the reduction adds in another order
            np.testing.assert_allclose(parts[0]["weights"][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
            assert np.array_equal(parts[0]["weights"][name], parts[1]["weights"][name])
        for name, values in alone["logged"].items():
            assert parts[0]["logged"][name] == pytest.approx(values, rel=1e-4), name


def test_without_trl_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name == "trl" or name.startswith("trl.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "hiddenkey_rs.train.sft")
    monkeypatch.delitem(sys.modules, "hiddenkey_rs.train.sft_data", raising=False)
    monkeypatch.delitem(vars(hk), "HiddenKeySFTTrainer", raising=False)
    with pytest.raises(hk.HiddenKeyError, match=r"needs the package trl .*with its extra \[trl\]"):
        _ = hk.HiddenKeySFTTrainer
