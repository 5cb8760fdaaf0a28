"""Dropout reaches what it should, however the model is called, wrapped, moved or subclassed; else an error says so."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

import families
import hiddenkey_rs as hk
from hiddenkey_rs.attachment import kernels

IDS = [0, 1, 2]
ALL = hk.HiddenKeyConfig.preset("hiddenkey", rate=0.3)


def loss_of(model: Any, batch: dict[str, Any], config: hk.HiddenKeyConfig = ALL) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss of a step of a copy, and its gradients."""
    model = copy.deepcopy(model).train()
    handle = hk.attach(model, config, stock_dropout="off")
    with handle.step(3, IDS):
        loss = handle.loss(**batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Mixed(transformers.BertForSequenceClassification):
    """Calls the parts of its encoder by itself, as mixup does."""

    def forward(self, input_ids: Any = None, labels: Any = None, **_: Any) -> Any:
        states = self.bert.encoder(self.bert.embeddings(input_ids)).last_hidden_state
        logits = self.classifier(self.bert.pooler(states))
        return types.SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)


def test_a_stack_that_nobody_calls_is_an_error() -> None:
    batch = families.batch("bert")
    given = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    model = Mixed(families.build("bert").config).train()
    handle = hk.attach(model, "hiddenkey", stock_dropout="off")
    message = (
        r"a layer ran without the call of the stack that holds it.*layer.0.attention.self' outside BertModel's own call"
    )
    with handle.step(0, IDS), pytest.raises(hk.UnsupportedModelError, match=message):
        handle.loss(**given)
    with handle.step(0, IDS), pytest.raises(hk.UnsupportedModelError, match=message):
        model(**given)
    with pytest.raises(hk.StateError, match="a training forward pass ran outside a step"):
        model(**given)
    with torch.no_grad():
        model(**given)
    model.eval()(**given)
    none = Mixed(families.build("bert").config).train()
    hk.attach(none, "none")
    none(**given).loss.backward()


def test_an_adapter_that_calls_the_forward_of_a_bare_stack_is_an_error() -> None:
    config = peft.AdaLoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query"], total_step=9)
    bare = transformers.BertModel(families.build("bert").config)
    model = peft.get_peft_model(bare, config).train()
    handle = hk.attach(model, "dropkey-column", stock_dropout="off")
    ids = families.batch("bert")["input_ids"]
    with handle.step(0, IDS), pytest.raises(hk.UnsupportedModelError, match="AdaLoRA do with a model that has no head"):
        model(input_ids=ids)
    with handle.step(0, IDS):
        bare(input_ids=ids)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_run_again_in_backward_are_no_error(reentrant: bool) -> None:
    """Without dropout there is no pass that a replay could find."""
    model = families.build("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    handle = hk.attach(model, "dropkey-column", stock_dropout="off")
    with handle.step(0, [-1]):  # a padding row
        loss = handle.loss(input_ids=torch.full((1, 6), 7), labels=torch.full((1, 6), 7))
    loss.backward()


def test_a_layer_is_as_causal_as_its_call_says() -> None:
    handle = hk.attach(families.build("llama"), "dropkey-column")
    site = next(site for site in handle.sites if site.kind == "attention")
    assert site.module.is_causal
    assert kernels.seen_by(site, site.module, {}) == (True, None)
    assert kernels.seen_by(site, site.module, {"is_causal": None, "sliding_window": 4}) == (True, 4)
    assert kernels.seen_by(site, site.module, {"is_causal": False}) == (False, None)


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_a_head_finds_its_bias_where_the_model_moved(family: str) -> None:
    model = families.build(family).train()
    model.final_logits_bias.normal_()
    batch = families.batch(family)
    expected, _ = loss_of(model, batch)
    handle = hk.attach(model, ALL, stock_dropout="off")
    bias = model.final_logits_bias
    model._apply(lambda tensor: tensor.clone())  # as .to() does
    assert model.final_logits_bias is not bias
    bias.fill_(1e4)
    with handle.step(3, IDS):
        assert torch.equal(handle.loss(**batch), expected)


def test_an_ffn_checkpointed_by_itself_is_refused_and_a_whole_layer_is_not() -> None:
    model, batch = families.build("llama", use_cache=False), families.batch("llama")
    expected = loss_of(model, batch)
    handle = hk.attach(model.train(), ALL, stock_dropout="off")
    layers = model.model.layers
    plain = layers[3].mlp
    layers[3].mlp = checkpoint_wrapper(plain)
    message = r"checkpointed by itself .*\(got CheckpointWrapper at 'model.layers.3.mlp'\)"
    with pytest.raises(hk.StateError, match=message), handle.step(3, IDS):
        pass
    layers[3].mlp = offload_wrapper(plain)  # which runs nothing again
    with handle.step(3, IDS):
        pass
    layers[3].mlp = plain
    for n in range(len(layers)):
        layers[n] = checkpoint_wrapper(layers[n])
    with handle.step(3, IDS):
        loss = handle.loss(**batch)
    loss.backward()
    assert torch.equal(loss, expected[0])
    found = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close({name: found[name] for name in expected[1]}, expected[1])


def test_a_part_that_is_trained_as_a_copy_is_refused_untouched() -> None:
    """peft's wrapper around a whole layer hands on the names of what is inside."""
    model = families.build("bert")
    settings = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["output"])
    model = peft.get_peft_model(model, settings)
    before = model.config._attn_implementation
    with pytest.raises(hk.UnsupportedModelError, match="a module stands for another one that it holds elsewhere"):
        hk.attach(model, "hiddenkey")
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("where", ["layer", "ffn"])
def test_what_was_wrapped_before_attaching_stays(where: str) -> None:
    model, batch = families.build("llama", use_cache=False), families.batch("llama")
    expected = loss_of(model, batch)
    for n, layer in enumerate(model.model.layers):
        if where == "ffn":
            layer.mlp = checkpoint_wrapper(layer.mlp)
        else:
            model.model.layers[n] = checkpoint_wrapper(layer)
    loss, gradients = loss_of(model, batch)
    assert torch.equal(loss, expected[0])
    found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients.items()}
    torch.testing.assert_close(found, expected[1])


def test_classes_of_a_notebook_are_judged_by_the_librarys() -> None:
    mine = type("Mine", (transformers.BertForSequenceClassification,), {"__module__": "__main__"})
    handle = hk.attach(mine(families.build("bert").config), "hiddenkey")
    assert handle.drops
    handle.detach()
    beside = types.ModuleType("beside")  # no file: nothing to read
    sys.modules["beside"] = beside
    try:
        mine = type("Mine", (transformers.BertForSequenceClassification,), {"__module__": "beside"})
        hk.attach(mine(families.build("bert").config), "hiddenkey")
    finally:
        del sys.modules["beside"]


def test_a_model_spread_over_devices_is_refused() -> None:
    model = families.build("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(
        hk.UnsupportedModelError, match=r"spread over devices.*\(got cuda:0, cuda:1 in its device_map\)"
    ):
        hk.attach(model, "hiddenkey")
    model.hf_device_map = {"model": 0, "lm_head": "cuda:0", "more": torch.device("cuda", 0)}
    hk.attach(model, "hiddenkey")


@pytest.mark.parametrize("gradient", ["one", "both"])
def test_a_batch_may_bring_the_number_of_items(gradient: str) -> None:
    """Of both terms: a sum over this batch divided by it."""
    model, batch = families.build("llama"), families.batch("llama")
    consistency = hk.Consistency(kind="kl", weight=0.7, gradient=gradient)
    handle = hk.attach(model.train(), hk.HiddenKeyConfig(consistency=consistency, layers="all"), stock_dropout="off")
    with handle.step(3, IDS):
        expected = handle.compute(batch, num_items=50)
        found = handle.compute({**batch, "num_items_in_batch": 50})
        assert torch.equal(handle.loss(**batch, num_items_in_batch=torch.tensor(50)), expected.loss)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.consistency, expected.consistency)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rows_of_padding_alone_have_nothing_to_drop(family: str) -> None:
    """Examples without a token, which sorting by length puts into one batch."""
    batch = families.batch(family) | {"attention_mask": torch.zeros_like(families.batch(family)["attention_mask"])}
    handle = hk.attach(families.build(family).train(), ALL, stock_dropout="off")
    with handle.step(3, IDS):
        loss = handle.loss(**batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert handle.realised() == {}
