"""The small decoder: its tokenizer, its blocks, training that can be stopped anywhere, what comes out, errors."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hiddenkey_rs as hk
from hiddenkey_rs import ConfigError, StateError
from hiddenkey_rs.experiments import controls, models, pretrain, small_decoder, tasks
from hiddenkey_rs.experiments.small_decoder import Recipe, blocks, bpe_tokenizer, new_model

ROWS = [
    {"source": f"town {n} : mayor : person {n % 3}", "target": f"Person {n % 3} leads town {n}.", "__line__": n}
    for n in range(24)
]
TINY = Recipe(vocabulary=300, width=16, layers=2, heads=2, context=64, batch_size=3, epochs=2, bf16=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return bpe_tokenizer([f"{row['source']}\n{row['target']}" for row in ROWS], 300)


# -- recipe ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_is_unknown(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_words_of_the_text_become_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == 300
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer(" town")["input_ids"]) == 1
    assert len(tokenizer(" Zug")["input_ids"]) > 1
    again = bpe_tokenizer([f"{row['source']}\n{row['target']}" for row in ROWS], 300)
    assert again.get_vocab() == tokenizer.get_vocab()


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=30), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_blocks_hold_every_document_once_and_whole(lengths: list[int], seed: int, epoch: int) -> None:
    documents = [[n] * length for n, length in enumerate(lengths)]
    found = blocks(documents, 10, seed, epoch)
    assert max(map(len, found)) <= 10
    told = [token for block in found for token in block]
    order = list(dict.fromkeys(told))
    assert sorted(order) == list(range(len(documents)))
    assert told == [token for n in order for token in documents[n]]
    for block, after in itertools.pairwise(found):
        assert len(block) + after.count(after[0]) > 10  # the next document did not fit
    assert blocks(documents, 10, seed, epoch) == found


def test_epochs_and_seeds_differ_in_order() -> None:
    documents = [[n] for n in range(50)]
    found = {str(blocks(documents, 10, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(found) == 4


def test_weights_are_the_seeds(tokenizer: Any) -> None:
    for family in small_decoder.FAMILIES:
        recipe = replace(TINY, family=family)
        a, b, c = (new_model(replace(recipe, seed=seed), tokenizer) for seed in (0, 0, 1))
        same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
        assert all(same)
        assert not torch.equal(next(a.parameters()), next(c.parameters()))
        assert a.config.model_type == family
        assert a.get_input_embeddings().weight is a.get_output_embeddings().weight
        assert a.training
        assert all(module.p == 0 for module in a.modules() if isinstance(module, torch.nn.Dropout))


def test_the_default_is_small(tokenizer: Any) -> None:
    for family in small_decoder.FAMILIES:
        model = new_model(Recipe(family=family), tokenizer)
        size = sum(value.numel() for value in model.parameters()) + (4096 - 300) * 256
        assert 5e6 < size < 15e6


def test_only_matrices_decay(tokenizer: Any) -> None:
    model = new_model(TINY, tokenizer)
    decaying, others = pretrain._optimiser(model, TINY).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {value.dim() for value in decaying["params"]} == {2}
    assert {value.dim() for value in others["params"]} == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "bert"}, r"bert"),
        ({"layers": 0}, r"layers must be a whole number above 0 \(got 0\)"),
        ({"vocabulary": 257}, r"256 bytes and two tokens \(got 257\)"),
        ({"width": 18, "heads": 6}, r"share the width evenly \(got 18 and 6\)"),
        ({"lr": 0.0}, r"above 0 \(got 0.0\)"),
        ({"warmup": 1.0}, r"a share of the steps \(got 1.0\)"),
    ],
)
def test_hostile_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)


# -- training -------------------------------------------------------------------------------------------------------


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "model.safetensors")


def test_padding_changes_nothing(tokenizer: Any) -> None:
    found = []
    for batch in ([[5, 6, 7, 8, 9], [10, 11]], [[10, 11], [5, 6, 7, 8, 9]]):
        model = new_model(TINY, tokenizer)
        loss = pretrain._step(model, pretrain._optimiser(model, TINY), batch, TINY, 0.1)
        alone = new_model(TINY, tokenizer)
        losses = [alone(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in batch]
        tokens = [len(ids) - 1 for ids in batch]
        wanted = sum(float(value) * count for value, count in zip(losses, tokens, strict=True)) / sum(tokens)
        found.append(loss)
        assert loss == pytest.approx(wanted, rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_decoder_is_trained_and_can_be_used(tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=12, lr=1e-2)
    found = pretrain.pretrain(recipe, ROWS, ROWS[:6], tmp_path / "small")
    assert found["finished"]
    assert len(found["history"]) == 12
    assert found["history"][-1]["perplexity"] < 0.5 * found["history"][0]["perplexity"]
    assert found["documents"] == len(ROWS)
    assert json.loads((tmp_path / "small" / "recipe.json").read_text()) == found
    assert not list((tmp_path / "small").glob("*pretraining*"))
    model, tokenizer = models.load_model(str(tmp_path / "small"), tasks.TASKS["e2e"], 0)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert controls.set_stock_rate(model, 0.1) > 0  # a control of the decoder experiments
    adapted = models.add_lora(model, tasks.TASKS["e2e"], 2, 4, 0.0, None, 0)
    handle = hk.attach(adapted, hk.HiddenKeyConfig.preset("hiddenkey"), stock_dropout="off")
    handle.detach()
    with pytest.raises(StateError, match="the decoder is finished"):
        pretrain.pretrain(recipe, ROWS, ROWS[:6], tmp_path / "small")


@pytest.mark.parametrize("family", small_decoder.FAMILIES)
def test_stopped_anywhere_the_same_weights_come_out(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(TINY, family=family, batch_size=1)
    whole = pretrain.pretrain(recipe, ROWS, ROWS[:4], tmp_path / "whole")
    assert whole["steps"] > 6
    pieces = tmp_path / "pieces"
    assert pretrain.pretrain(recipe, ROWS, ROWS[:4], pieces, stop_after=2)["step"] == 2
    step, count = pretrain._step, 0

    def killed(*arguments: Any) -> float:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(pretrain, "_step", killed)
    with pytest.raises(KeyboardInterrupt):  # in step 6; the checkpoint is of step 3
        pretrain.pretrain(recipe, ROWS, ROWS[:4], pieces, save_every=3)
    monkeypatch.setattr(pretrain, "_step", step)
    found = pretrain.pretrain(recipe, ROWS, ROWS[:4], pieces)
    assert found["history"] == whole["history"]
    a, b = weights(tmp_path / "whole"), weights(pieces)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a.keys() == b.keys()


def test_stopped_before_the_first_checkpoint_it_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for place in ("bpe_tokenizer", "_step"):
        with monkeypatch.context() as patched:
            patched.setattr(pretrain, place, killed)
            with pytest.raises(KeyboardInterrupt):
                pretrain.pretrain(TINY, ROWS, ROWS[:4], tmp_path)
    assert pretrain.pretrain(TINY, ROWS, ROWS[:4], tmp_path)["finished"]


def test_another_recipe_does_not_go_on(tmp_path: Path) -> None:
    pretrain.pretrain(TINY, ROWS, ROWS[:4], tmp_path / "a", stop_after=1)
    with pytest.raises(StateError, match=r"made another choice \(got lr=0.5, it has 0.002\)"):
        pretrain.pretrain(replace(TINY, lr=0.5), ROWS, ROWS[:4], tmp_path / "a")
    with pytest.raises(StateError, match=r"read another text \(got sha256 [0-9a-f]{12}, it has"):
        pretrain.pretrain(TINY, ROWS[:-1], ROWS[:4], tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    with pytest.raises(StateError, match="holds other files"):
        pretrain.pretrain(TINY, ROWS, ROWS[:4], tmp_path / "b")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--width", "16", "--heads", "2", "--layers", "1"]
    flags += ["--context", "64", "--vocabulary", "300", "--epochs", "1", "--no-bf16", "--family", "llama"]
    assert pretrain.main(flags) == 2
    assert "pretrain: error: the data folder does not hold the task" in capsys.readouterr().err
    for split in ("train", "dev"):
        path = tmp_path / "WebNLG" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert pretrain.main(flags) == 0
    assert "development perplexity" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert (found["recipe"]["family"], found["recipe"]["bf16"]) == ("llama", False)
    assert pretrain.main(flags) == 2
