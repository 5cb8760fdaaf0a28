"""Adapters of every kind that runs on a CPU: nothing of ours touches weights, so all of them work."""

from __future__ import annotations

import peft
import pytest
import torch

import families
import hiddenkey_rs as hk

IDS = [4, 5, 6]


def lora(family: str, **changes: object) -> peft.PeftModel:
    targets = {"bert": ["query", "value"], "mixtral": ["q_proj"], "gpt_oss": ["q_proj"], "llama": ["q_proj", "v_proj"]}
    task = "SEQ_CLS" if family in families.ENCODERS else "CAUSAL_LM"
    arguments = {"r": 2, "target_modules": targets[family], "task_type": task, "init_lora_weights": False}
    torch.manual_seed(0)
    return peft.get_peft_model(families.build(family), peft.LoraConfig(**{**arguments, **changes})).train()


def one_step(model: torch.nn.Module, family: str, config: hk.HiddenKeyConfig) -> dict[str, torch.Tensor]:
    handle = hk.attach(model, config, stock_dropout="off")
    with handle.step(3, IDS):
        loss = handle.loss(**families.batch(family))
    loss.backward()
    assert handle.report().rows
    assert handle.realised()
    handle.detach()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found
    assert all(torch.isfinite(grad).all() for grad in found.values())
    return found


def config() -> hk.HiddenKeyConfig:
    return hk.HiddenKeyConfig(layers="all", attention=hk.AttentionDrop(rate=0.3), hidden=hk.HiddenDrop(rate=0.3))


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral", "gpt_oss"])
def test_lora(family: str) -> None:
    grads = one_step(lora(family), family, config())
    assert any("lora_A" in name for name in grads)


def test_lora_names_in_the_report_are_the_base_models() -> None:
    plain = hk.attach(families.build("bert"), config(), stock_dropout="off").report()
    wrapped = hk.attach(lora("bert"), config(), stock_dropout="off").report()
    assert [row.module for row in plain.rows] == [row.module for row in wrapped.rows]


def test_adapting_the_ffn_output_itself_keeps_the_site() -> None:
    """peft replaces the very module that HiddenCut hooks."""
    model = lora("bert", target_modules=["output.dense"])
    one_step(model, "bert", config())


def test_dora() -> None:
    grads = one_step(lora("bert", use_dora=True), "bert", config())
    assert any("magnitude" in name for name in grads)


def test_several_adapters() -> None:
    model = lora("bert")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    handle = hk.attach(model, config(), stock_dropout="off")
    losses = []
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        with handle.step(0, IDS):
            losses.append(float(handle.loss(**families.batch("bert"))))
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_lora_on_expert_parameters(family: str) -> None:
    """``target_parameters``: peft refuses any ``lora_dropout`` there, so this is the only dropout to be had."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with pytest.raises(ValueError, match="dropout"):
        lora(family, target_modules=[], target_parameters=parameters, lora_dropout=0.1)
    grads = one_step(lora(family, target_modules=[], target_parameters=parameters), family, config())
    assert any("experts" in name for name in grads)


def test_quantised_base() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = families.build("llama", hidden_size=64, head_dim=16, intermediate_size=64)
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            quantised = bnb.nn.Linear4bit(64, module.out_features, bias=False, compute_dtype=torch.float32)
            quantised.load_state_dict({"weight": module.weight.data})
            model.set_submodule(name, quantised.to("cpu"))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    grads = one_step(adapted.train(), "llama", config())
    assert any("lora_B" in name for name in grads)


def test_merging_after_training_gives_a_stock_model() -> None:
    model = lora("bert")
    one_step(model, "bert", config())
    batch = families.batch("bert")
    expected = model.eval()(**batch).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
    assert merged.config._attn_implementation == "sdpa"


def test_the_dropout_of_other_adapters_stays_theirs() -> None:
    settings = peft.VeraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], vera_dropout=0.25)
    model = peft.get_peft_model(families.build("bert"), settings).train()
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    assert {m.p for n, m in model.named_modules() if "vera_dropout." in n and isinstance(m, torch.nn.Dropout)} == {0.25}
    assert handle.adapter_dropout
    assert not handle.stock.live


def test_lora_dropout_stays_the_adapters() -> None:
    model = lora("bert", lora_dropout=0.25)
    handle = hk.attach(model, config(), stock_dropout="off")
    rates = {m.p for name, m in model.named_modules() if "lora_dropout" in name and isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    handle.detach()
