"""The SFT trainer: TRL's losses where nothing is dropped, and the same masks and losses packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch

pytest.importorskip("trl", reason="the SFT trainer needs TRL")

import hiddenkey_rs as hk
import sft_cases as cases
from hiddenkey_rs.attachment import two_pass

LAYOUTS: dict[str, dict[str, Any]] = {
    "rows": {},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 8},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "wrapped and padding-free": {"packing": True, "packing_strategy": "wrapped", "padding_free": True},
}
ALL = {"per_device_train_batch_size": 12, "max_steps": 1}
ELEMENT = hk.HiddenKeyConfig(
    hk.AttentionDrop(pattern="element", rate=0.3), hk.HiddenDrop(pattern="span", rate=0.3), layers="all"
)


@pytest.mark.parametrize(("layout", "shuffled"), [*((name, False) for name in LAYOUTS), ("rows", True), ("bfd", True)])
def test_without_dropout_it_is_trl(layout: str, shuffled: bool, tmp_path: Path) -> None:
    how = {**LAYOUTS[layout], "shuffle_dataset": shuffled, "max_steps": 3, "per_device_train_batch_size": 2}
    runs, gradients = [], []
    for make, own in ((cases.stock, {}), (cases.trainer, {"config": cases.STILL})):
        run = make(tmp_path, cases.texts(), **how, **own)
        gradients.append(cases.last_gradient(run))
        run.train()
        runs.append(run)
    # Both sum the same float32 numbers in another order. How much Adam makes of that in rows cut anywhere differs by processor.
    rel, rtol, atol = (3e-5, 1e-3, 1e-3) if "wrapped" in layout else (2e-6, 1e-4, 1e-5)
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert cases.logged(runs[1], name) == pytest.approx(cases.logged(runs[0], name), rel=rel, abs=1e-7), name
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=rtol, atol=atol * largest, msg=name)


def test_trls_metrics_are_not_all_zero(tmp_path: Path) -> None:
    """Once the model has learnt something, accuracy is a number that can be wrong."""
    how = {"max_steps": 12, "learning_rate": 5e-2, "per_device_train_batch_size": 12}
    data = datasets.Dataset.from_dict({"text": [cases.sentence(n % 2, 6) for n in range(12)]})
    runs = [cases.stock(tmp_path, data, **how), cases.trainer(tmp_path, data, config=cases.STILL, **how)]
    for run in runs:
        run.train()
    found = [cases.logged(run, "mean_token_accuracy") for run in runs]
    assert found[0][-1] > 0.5
    assert found[1] == pytest.approx(found[0], abs=0.02)  # an equal choice may fall the other way


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "mistral", "gemma2", "phi3", "mixtral"])
def test_packed_or_not_the_masks_and_the_losses_are_the_same(family: str, tmp_path: Path) -> None:
    found = []
    for layout in ("rows", "bfd", "padding-free")[: 3 if family == "llama" else 2]:
        small = {"n_positions": 40} if family == "gpt2" else {}
        model = cases.build(family, **small)
        run = cases.trainer(tmp_path, cases.texts(), model, family=family, **{**LAYOUTS[layout], **ALL})
        masks = cases.Masks(run)
        run.train()
        found.append((masks, [cases.logged(run, name)[0] for name in ("task_loss", "consistency_loss")]))
    assert {key[-1] for key in found[0][0]} == set(range(12))
    for masks, terms in found[1:]:
        assert cases.same(masks, found[0][0])
        assert terms == pytest.approx(found[0][1], rel=1e-5)


def test_pairs_and_spans_of_packed_documents(tmp_path: Path) -> None:
    masks, terms = [], []
    for layout in ("rows", "bfd"):
        run = cases.trainer(tmp_path, cases.texts(), config=ELEMENT, **{**LAYOUTS[layout], **ALL})
        masks.append(cases.Masks(run))
        run.train()
        terms.append(cases.logged(run)[0])
    pairs = [{k: v for k, v in found.items() if k[3] == "attention"} for found in masks]
    spans = [{k: v[..., : 4 + 2 * (k[4] % 5)] for k, v in found.items() if k[3] == "ffn"} for found in masks]
    for one, two in (pairs, spans):
        assert one
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[key], two[key]) for key in one)
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_a_documents_parts_keep_their_places(strategy: str, tmp_path: Path) -> None:
    """What a part of a document drops is what the whole document drops there."""
    whole = cases.trainer(tmp_path, cases.texts(), **ALL)
    expected = cases.Masks(whole)
    whole.train()
    how = {"packing": True, "packing_strategy": strategy, "max_length": 8}
    run = cases.trainer(tmp_path, cases.texts(), **{**how, **ALL})
    drawn: list[Any] = []
    run.handle.record_masks(drawn.append)
    run.train()
    parts = set()
    for mask in drawn:
        for number, sample in enumerate(mask.samples.tolist()):
            full = expected[0, mask.key.branch, mask.key.layer, mask.key.site, sample]
            keep, length = mask.keep[number].numpy(), int(mask.lengths[number])
            if mask.key.site == "attention":
                assert np.array_equal(keep[..., :length], full[..., :length])
            else:
                assert np.array_equal(keep[:, :length], full[:, :length])
            parts.add((sample, length))
    assert len(parts) > 12, "no document was cut"
    # A part's places go on counting: the last one ends where its document does.
    assert {sample: max(n for s, n in parts if s == sample) for sample, _ in parts} == {
        sample: 4 + 2 * (sample % 5) for sample in range(12)
    }


def conversation(number: int) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * 2
    return [{"role": role, "content": cases.sentence(10 * number + n, 2 + n)} for n, role in enumerate(roles)]


COMPLETIONS = datasets.Dataset.from_dict(
    {
        "prompt": [cases.sentence(n, 3 + n) + " " for n in range(6)],
        "completion": [cases.sentence(50 + n, 2 + n) for n in range(6)],
    }
)
CONVERSATIONS = datasets.Dataset.from_dict({"messages": [conversation(n) for n in range(6)]})


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("data", "how", "tokens"),
    [
        (COMPLETIONS, {}, sum(2 + n + 1 for n in range(6))),
        (COMPLETIONS, {"completion_only_loss": False}, sum(3 + n + 2 + n for n in range(6))),
        (CONVERSATIONS, {"assistant_only_loss": True}, 6 * (3 + 1 + 5 + 1)),
    ],
    ids=["completions", "prompts too", "assistant"],
)
def test_both_terms_see_the_tokens_that_carry_loss(
    data: Any, how: Any, tokens: int, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Any] = []
    original = two_pass.token_losses

    def spy(head: Any, first: Any, second: Any, labels: Any, **rest: Any) -> Any:
        compared.append((first.shape, second.shape, labels))
        return original(head, first, second, labels, **rest)

    how = {**how, "packing": packing, "per_device_train_batch_size": 6, "max_steps": 1, "max_length": 32}
    with monkeypatch.context() as patched:
        patched.setattr(two_pass, "token_losses", spy)
        cases.trainer(tmp_path, data, **how).train()
    first, second, labels = compared[0]
    assert len(compared) == 1
    assert (first, second, len(labels)) == ((tokens, 16), (tokens, 16), tokens)
    expected = cases.trainer(tmp_path, data, config=cases.STILL, **how)
    trl = cases.stock(tmp_path, data, **how)
    for one in (expected, trl):
        one.train()
    assert cases.logged(expected) == pytest.approx(cases.logged(trl), rel=2e-6)


def test_an_adapter_made_by_trl(tmp_path: Path) -> None:
    """``peft_config`` wraps the model inside TRL; what is attached is the wrapped model."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    runs = []
    for own in (True, False):
        torch.manual_seed(0)
        model = cases.build() if own else peft.get_peft_model(cases.build(), lora)
        torch.manual_seed(5)
        run = cases.trainer(tmp_path, cases.texts(), model, packing=True, **({"peft_config": lora} if own else {}))
        for name, parameter in run.model.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.constant_(parameter, 0.01 * len(name) / 60)
        run.train()
        runs.append(run)
    assert cases.logged(runs[0]) == cases.logged(runs[1])
    assert all("lora_" in name for name in cases.weights(runs[0].model))
    runs[0].save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "hiddenkey_config.json"} <= names


def test_the_routers_loss_is_not_lost(tmp_path: Path) -> None:
    """TRL switches it on in the model's config; both its value and its weight in the loss are TRL's."""
    how = {"router_aux_loss_coef": 0.5, "packing": True}
    runs = [
        cases.stock(tmp_path, cases.texts(), family="mixtral", **how),
        cases.trainer(tmp_path, cases.texts(), family="mixtral", config=cases.STILL, **how),
    ]
    for run in runs:
        run.train()
    for name in ("loss", "aux_loss", "entropy", "mean_token_accuracy"):
        assert cases.logged(runs[1], name) == pytest.approx(cases.logged(runs[0], name), rel=1e-5), name
    assert cases.logged(runs[0], "aux_loss")[0] > 0.1


def test_a_model_by_its_name(tmp_path: Path) -> None:
    cases.build().save_pretrained(tmp_path / "model")
    named = cases.trainer(tmp_path, cases.texts(), str(tmp_path / "model"))
    given = cases.trainer(tmp_path, cases.texts())
    for run in (named, given):
        run.train()
    assert cases.logged(named) == cases.logged(given)


def test_preset_names_and_the_default(tmp_path: Path) -> None:
    assert cases.trainer(tmp_path, cases.texts(), config=None).handle.config == hk.HiddenKeyConfig()
    run = cases.trainer(tmp_path, cases.texts(), config="hiddenkey-js", packing=True, max_steps=1)
    run.train()
    assert cases.logged(run, "consistency_loss")[0] > 0
