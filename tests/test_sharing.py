"""Layers below the first dropping one run once for both passes, and nothing but time changes."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import families
import hiddenkey_rs as hk
from families import DECODERS

IDS = [5, 6, 1 << 35]


def step(model, config, batch, **how) -> tuple[torch.Tensor, dict[str, torch.Tensor], hk.Handle]:
    handle = hk.attach(model, config, stock_dropout="off", **how)
    with handle.step(3, IDS):
        loss = handle.loss(**batch)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, handle


def whole(handle: hk.Handle) -> None:
    """Let the second pass run every layer."""
    handle.sharing.layers = []


def count_calls(model: torch.nn.Module, handle: hk.Handle) -> list[int]:
    calls = [0] * families.LAYERS
    for stack in handle.stacks[-1:]:
        for index, site in enumerate(s for s in stack.sites if s.kind == "attention"):
            site.module.register_forward_pre_hook(
                lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)  # type: ignore[misc]
            )
    return calls


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, kind) for family in DECODERS for kind in ("kl", "js")),
        ("llama", "jensen-shannon"),
        ("gpt2", "jensen-shannon"),
    ],
)
def test_a_decoders_second_pass_starts_in_the_middle(family: str, kind: str) -> None:
    config = hk.HiddenKeyConfig(consistency=hk.Consistency(kind=kind))
    batch = families.batch(family)
    model = families.build(family)
    twin = copy.deepcopy(model)
    results = []
    for candidate, all_layers in ((model, False), (twin, True)):
        handle = hk.attach(candidate, config, stock_dropout="off")
        assert handle.sharing.count == families.LAYERS // 2
        if all_layers:
            whole(handle)
        calls = count_calls(candidate, handle)
        with handle.step(3, IDS):
            loss = handle.loss(**batch)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in candidate.named_parameters() if p.grad is not None}, calls))
        assert all("forward" not in vars(layer) for stack in handle.stacks for layer in stack.layer_modules)
    # js runs its second pass in evaluation, where the stock attention sums in another order
    exact = {"rtol": 0.0, "atol": 0.0} if kind != "js" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(results[0][0], results[1][0], **exact)
    torch.testing.assert_close(results[0][1], results[1][1], **exact)
    half = families.LAYERS // 2
    assert results[0][2] == [1] * half + [2] * half
    assert results[1][2] == [2] * families.LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_under_activation_checkpointing(family: str, reentrant: bool) -> None:
    batch = families.batch(family)
    model = families.build(family)
    expected = step(copy.deepcopy(model), hk.HiddenKeyConfig(), batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = step(model, hk.HiddenKeyConfig(), batch)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_an_encoder_that_drops_nothing_runs_once() -> None:
    model = families.build("bart")
    config = hk.HiddenKeyConfig(layers=[2, 3])
    handle = hk.attach(model, config, stock_dropout="off")
    assert [len(layers) for layers in handle.sharing.layers] == [families.LAYERS, 2]
    assert "runs 2 of 8 layers" in str(handle.report())
    batch = families.batch("bart")
    with handle.step(3, IDS):
        loss = handle.loss(**batch)
        whole(handle)
        assert torch.equal(handle.loss(**batch), loss)


@pytest.mark.parametrize(
    ("family", "config", "stock", "reason"),
    [
        ("bert", hk.HiddenKeyConfig(), "off", "the first layer drops already"),
        ("bert", hk.HiddenKeyConfig(layers=[2, 3]), "keep", "torch's own dropout draws anew in every pass"),
        ("albert", hk.HiddenKeyConfig(layers=[2, 3]), "off", "the layers of AlbertModel are one module"),
        ("llama", hk.HiddenKeyConfig(input=hk.ElementDrop(rate=0.1)), "off", "the first layer drops already"),
    ],
)
def test_the_report_says_why_all_layers_run_again(family: str, config, stock: str, reason: str) -> None:
    handle = hk.attach(families.build(family), config, stock_dropout=stock)
    assert f"second pass: runs all {families.LAYERS} layers ({reason})" in str(handle.report())
    assert not handle.sharing.layers


def test_one_pass_is_not_spoken_of() -> None:
    handle = hk.attach(families.build("llama"), "hiddenkey-minus", stock_dropout="off")
    assert "second pass" not in str(handle.report())


def noisy(model: torch.nn.Module) -> None:
    """As NEFTune, whose hook comes after attaching."""
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output + torch.randn_like(output) / 9)


def test_noise_below_the_cut_is_of_each_pass() -> None:
    model, batch = families.build("llama"), families.batch("llama")
    twin = copy.deepcopy(model)
    found = []
    for candidate in (model, twin):
        handle = hk.attach(candidate, hk.HiddenKeyConfig(), stock_dropout="off")
        noisy(candidate)
        if candidate is twin:
            handle.sharing.layers = []
        calls = count_calls(candidate, handle)
        for number in range(2):
            with handle.step(number, IDS):
                handle.loss(**batch)
        found.append(float(handle.last.consistency))
        assert calls == [4] * families.LAYERS
        if candidate is model:
            assert "something below the first dropping layer draws anew in every pass" in str(handle.report())
    assert found[0] != found[1]  # another order of the passes, so other noise
    assert min(found) > 0


def test_hooks_of_others_act_once_in_each_pass() -> None:
    """On the last layer that both passes share, too: a steering vector, say."""
    batch, losses = families.batch("llama"), []
    for all_layers in (False, True):
        model = families.build("llama")
        model.model.layers[families.LAYERS // 2 - 1].register_forward_hook(lambda module, args, output: output + 0.5)
        handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
        if all_layers:
            whole(handle)
        with handle.step(3, IDS):
            losses.append(handle.loss(**batch))
    assert torch.equal(*losses)


def test_adapters_that_drop_ranks_draw_in_every_pass() -> None:
    settings = peft.LoHaConfig(r=2, target_modules=["q_proj"], rank_dropout=0.1)
    model = peft.get_peft_model(families.build("llama"), settings)
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    assert handle.adapter_dropout
    assert "torch's own dropout draws anew in every pass" in str(handle.report())
    plain = hk.HiddenKeyConfig(attention=None, hidden=None)
    handle.detach()
    hk.attach(model, plain, stock_dropout="off")  # two passes that differ


def test_routers_that_run_in_no_second_pass_have_no_loss_there() -> None:
    model, batch = families.build("mixtral"), families.batch("mixtral")
    config = hk.HiddenKeyConfig(attention=None, hidden=None, output=hk.ElementDrop(rate=0.2))
    handle = hk.attach(model, config, stock_dropout="off")
    assert handle.sharing.count == families.LAYERS
    with handle.step(3, IDS):
        loss = handle.loss(**batch, output_router_logits=True)
        whole(handle)
        torch.testing.assert_close(handle.loss(**batch, output_router_logits=True), loss)


@pytest.mark.parametrize("family", ["mbart", "plbart", "bart", "t5"])
def test_a_padding_row_of_an_encoder_decoder(family: str) -> None:
    handle = hk.attach(families.build(family), "hiddenkey", stock_dropout="off")
    with handle.step(0, [-1]):
        loss = handle.loss(input_ids=torch.full((1, 6), 7), labels=torch.full((1, 5), -100))
    loss.backward()
    assert float(loss.detach()) == 0


def test_a_copy_of_a_compiled_model_is_its_own() -> None:
    model, batch = families.build("llama"), families.batch("llama")
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    model.compile(backend="eager")
    with handle.step(0, IDS):
        handle.loss(**batch)
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("sdpa")
    lowest = copied.model.layers[0]
    assert lowest.forward.__self__ is lowest
    for value in copied.parameters():
        value.data.zero_()
    states = torch.randn(1, 3, model.config.hidden_size)
    rotary = copied.model.rotary_emb(states, torch.arange(3)[None])
    assert torch.equal(lowest.eval()(states, position_embeddings=rotary), states)
