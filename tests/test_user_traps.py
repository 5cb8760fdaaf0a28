"""What users of peft and transformers do around an attached model, and what must not go wrong silently then."""

from __future__ import annotations

import gc
import types
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import families
import hiddenkey_rs as hk
from hiddenkey_rs.attachment import checks

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
IDS = [0, 1]


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **options)).train()


def bert(**options: Any) -> Any:
    torch.manual_seed(0)
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    config = transformers.BertConfig(**SHAPE, **plain, **options)
    return transformers.BertForSequenceClassification(config).train()


def tokens(rows: int = 2, length: int = 8) -> torch.Tensor:
    return torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(1))


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 4} | options)


# -- masks of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, float("-inf"), -1e9, -65504.0, -1e4, -9984.0])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_forbidden_pair_stays_forbidden_whatever_number_says_so(number: float, impl: str) -> None:
    model = llama()
    handle = hk.attach(model, hk.HiddenKeyConfig.preset("dropkey-column", rate=0.4, layers="all"), impl=impl)
    ids = tokens()
    other = ids.clone()
    other[:, 5:] = 7  # only the future differs
    mask = torch.zeros(2, 1, 8, 8).masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), number)
    logits = []
    for given in (ids, other):
        with handle.step(0, IDS):
            logits.append(model(input_ids=given, attention_mask=mask).logits[:, :5])
    assert torch.equal(*logits)
    assert handle.realised()["attention"] == pytest.approx(0.4, abs=0.2)


def test_a_bias_is_none_the_less_a_bias() -> None:
    model = llama()
    causal = torch.zeros(2, 1, 8, 8).masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), float("-inf"))
    bias = causal - torch.arange(8.0).flip(0) * 300  # down to -2100
    plain = model(input_ids=tokens(), attention_mask=bias).logits
    handle = hk.attach(model, hk.HiddenKeyConfig.preset("dropkey-column", rate=2**-16, layers="all"))
    with handle.step(0, IDS):
        assert torch.allclose(model(input_ids=tokens(), attention_mask=bias).logits, plain, atol=1e-5)


def test_a_mapping_of_masks_is_taken() -> None:
    config = transformers.Qwen2Config(**SHAPE, num_key_value_heads=4, attn_implementation="eager")
    model = transformers.Qwen2ForCausalLM(config).train()
    causal = torch.zeros(2, 1, 8, 8).masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), float("-inf"))
    batch = {"input_ids": tokens(), "labels": tokens(), "attention_mask": {"full_attention": causal}}
    plain = model(**batch).loss
    handle = hk.attach(model, "none")
    with handle.step(0, IDS):
        assert float(handle.loss(**batch)) == pytest.approx(float(plain), abs=1e-5)


def test_no_mask_in_a_mapping_is_a_causal_one() -> None:
    """transformers leaves causality to a flag of the layer then."""
    config = transformers.Qwen2Config(
        **SHAPE, num_key_value_heads=4, use_sliding_window=True, sliding_window=3, max_window_layers=1
    )
    model = transformers.Qwen2ForCausalLM(config).train()
    asked = {"config": config, "inputs_embeds": torch.zeros(2, 8, 32), "attention_mask": None, "past_key_values": None}
    asked["position_ids"] = torch.arange(8)[None]
    masks = transformers.masking_utils.create_masks_for_generate(**asked)
    assert masks["full_attention"] is None
    plain = model(input_ids=tokens(), attention_mask=masks).logits
    results = []
    for preset in ("none", "dropkey-column"):
        handle = hk.attach(model, hk.HiddenKeyConfig.preset(preset, layers="all"), impl="auto")
        for given in (masks, torch.ones(2, 8)):
            with handle.step(0, IDS):
                results.append(model(input_ids=tokens(), attention_mask=given, use_cache=False).logits)
        handle.detach()
    torch.testing.assert_close(results[0], plain)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[3])


# -- the model's own loss -------------------------------------------------------------------------------------------


class OneMore(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.loss = None if outputs.loss is None else outputs.loss + 1
        return outputs


def _adalora() -> Any:
    return peft.get_peft_model(
        llama(), peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9)
    )


def _own_function() -> Any:
    model = llama()
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    return model


LOSSES = {
    "AdaLoRA": (_adalora, {}),
    "loss_function": (_own_function, {}),
    "subclass": (lambda: OneMore(transformers.LlamaConfig(**SHAPE)).train(), {}),
    "num_items": (llama, {"num_items_in_batch": 100}),
    "router": (lambda: families.build("mixtral").train(), {"output_router_logits": True}),
    "plain": (llama, {}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_models_own(name: str) -> None:
    build, more = LOSSES[name]
    model = build()
    batch = {"input_ids": tokens(), "labels": tokens()} | more
    plain = model(**batch).loss
    handle = hk.attach(model, "none")
    with handle.step(0, IDS):
        assert float(handle.loss(**batch)) == pytest.approx(float(plain), rel=1e-5)


def test_a_head_parameter_without_use_gets_no_gradient(tmp_path: Any) -> None:
    model = peft.get_peft_model(llama(), lora(target_modules=["q_proj", "lm_head"]))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second", is_trainable=True)
    batch = {"input_ids": tokens(), "labels": tokens()}
    handle = hk.attach(model, "hiddenkey", stock_dropout="off")
    with handle.step(0, IDS):
        handle.loss(**batch).backward()
    gradients = {name: p.grad is not None for name, p in model.named_parameters() if "lm_head.lora_B" in name}
    assert {name.split(".")[-2]: seen for name, seen in gradients.items()} == {"default": True, "second": False}


def test_losses_without_gradient_are_those_of_training() -> None:
    for build, batch in ((llama, {"labels": tokens()}), (bert, {"labels": torch.tensor([0, 1])})):
        model = build()
        handle = hk.attach(model, hk.HiddenKeyConfig.preset("hiddenkey", rate=0.3), stock_dropout="off")
        found = []
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), handle.step(0, IDS):
                handle.compute({"input_ids": tokens(), **batch})
            assert handle.last is not None
            assert handle.last.consistency is not None
            found.append((float(handle.last.task), float(handle.last.consistency)))
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        assert found[0] == pytest.approx(found[2], rel=1e-5)


def test_classes_that_carry_no_loss_count_nowhere() -> None:
    model = bert(num_labels=2)
    handle = hk.attach(model, hk.HiddenKeyConfig.preset("hiddenkey", rate=0.3), stock_dropout="off")
    ids, labels = tokens(4), torch.tensor([0, -100, -100, 1])
    assert int(handle.count_items({"input_ids": ids, "labels": labels})) == 2
    with handle.step(0, [0, 1, 2, 3]):
        whole = handle.compute({"input_ids": ids, "labels": labels})
    parts = []
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        with handle.step(0, list(range(4))[part]):
            parts.append(handle.compute({"input_ids": ids[part], "labels": labels[part]}, num_items=2))
    assert sum(float(part.loss) for part in parts) == pytest.approx(float(whole.loss), rel=1e-5)
    assert sum(float(part.task) for part in parts) == pytest.approx(float(whole.task), rel=1e-5)
    assert float(parts[1].loss) == 0.0


@pytest.mark.parametrize("compiled", [False, True])
def test_labels_of_rows_are_no_tokens(compiled: bool) -> None:
    """As many labels as tokens: they must not be taken for the decoder's inputs, or for its padding."""
    shape = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = transformers.BartConfig(
        **shape, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=100, dropout=0.0, num_labels=10
    )
    config.problem_type = "multi_label_classification"
    model = transformers.BartForSequenceClassification(config).train()
    ids = tokens(4, 10)
    ids[:, -1] = config.eos_token_id
    batch = {"input_ids": ids, "labels": torch.full((4, 10), -100.0)}
    with torch.no_grad():
        plain = float(model(**batch).loss)
    handle = hk.attach(model, hk.HiddenKeyConfig.preset("hiddencut-element", rate=2**-16, layers="all"))
    if compiled:
        model.compile(backend="aot_eager")
    with handle.step(0, range(4)):
        assert float(handle.loss(**batch)) == pytest.approx(plain, rel=1e-3)
    assert {site: total for site, (_, total) in handle.counted().items()} == {"ffn": 1280, "decoder-ffn": 1280}


# -- what is attached to ----------------------------------------------------------------------------------------------


def test_gpt2_with_cross_attention_is_refused() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, add_cross_attention=True)
    with pytest.raises(hk.UnsupportedModelError, match=r"cross-attention.*got add_cross_attention=True"):
        hk.attach(transformers.GPT2LMHeadModel(config), "none")


def test_attention_that_the_pass_does_not_reach_is_an_error() -> None:
    model = llama()
    handle = hk.attach(model, "dropkey-column")
    layer = model.model.layers[0]
    own = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **kwargs: own(
        *args, **{name: value for name, value in kwargs.items() if name != "hiddenkey"}
    )
    with handle.step(0, IDS), pytest.raises(hk.UnsupportedModelError, match=r"no keyword arguments .*LlamaAttention"):
        handle.loss(input_ids=tokens(), labels=tokens())


def _merged(model: Any) -> None:
    model.merge_and_unload()


def _new_head(model: Any) -> None:
    model.base_model.model.classifier = torch.nn.Linear(32, 2)


def _second_adapter(model: Any) -> None:
    model.add_adapter("two", lora(task_type="SEQ_CLS", target_modules=["output.dense"]))


def _shorter(model: Any) -> None:
    model.base_model.model.bert.encoder.layer = model.base_model.model.bert.encoder.layer[:1]


@pytest.mark.parametrize("change", [_merged, _new_head, _second_adapter, _shorter])
def test_modules_that_were_replaced_are_an_error(change: Any) -> None:
    targets = ["query"] if change is _second_adapter else ["output.dense"]
    model = peft.get_peft_model(bert(), lora(task_type="SEQ_CLS", target_modules=targets))
    config = hk.HiddenKeyConfig.preset("hiddenkey-minus", rate=0.5, output=hk.ElementDrop(rate=0.5))
    handle = hk.attach(model, config)
    with handle.step(0, IDS):
        handle.loss(input_ids=tokens(), labels=torch.tensor([0, 1]))
    change(model)
    with (
        pytest.raises(hk.StateError, match=r"a module was replaced after attaching.*attach again"),
        handle.step(1, IDS),
    ):
        pass
    handle.detach()


def test_layers_that_are_compiled_alone_are_the_same_layers() -> None:
    model = llama()
    batch = {"input_ids": tokens(), "labels": tokens()}
    handle = hk.attach(model, "hiddencut-element")
    expected = _losses(handle, batch)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    assert _losses(handle, batch) == expected


def _losses(handle: hk.Handle, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, float]]:
    """The loss of a step, and what was dropped of it."""
    handle.reset_counts()
    with handle.step(0, IDS):
        loss = float(handle.loss(**batch))
    return loss, handle.realised()


@pytest.mark.parametrize("preset", ["dropkey-column", "hiddenkey-minus"])
def test_layers_out_of_training_drop_nothing(preset: str) -> None:
    model = bert()
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
    plain = float(model(**batch).loss)
    handle = hk.attach(model, hk.HiddenKeyConfig.preset(preset, rate=0.5))
    model.bert.encoder.layer.eval()
    with handle.step(0, IDS):
        assert float(handle.loss(**batch)) == pytest.approx(plain, abs=1e-6)
    assert handle.realised() == {}
    model.bert.encoder.layer[1].train()
    with handle.step(0, IDS):
        assert float(handle.loss(**batch)) != pytest.approx(plain, abs=1e-4)
    assert {row.layer for row in handle.report().rows if row.measured is not None} == {1}


@pytest.mark.parametrize(
    "adapter",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt", "prefix"],
)
def test_prompt_learning_is_refused(adapter: Any) -> None:
    model = peft.get_peft_model(llama(), adapter)
    with pytest.raises(hk.UnsupportedModelError, match=r"prompt learning puts tokens before every row .*LoraConfig"):
        hk.attach(model, "none")


def test_attention_may_be_set_while_attached() -> None:
    model = bert()
    handle = hk.attach(model, "dropkey-column")
    model.eval()
    model.set_attn_implementation("eager")
    assert len(model(input_ids=tokens(), output_attentions=True).attentions) == 2
    model.train()
    with handle.step(0, IDS):
        handle.loss(input_ids=tokens(), labels=torch.tensor([0, 1])).backward()
    assert handle.realised()["attention"] > 0
    handle.detach()
    assert model.config._attn_implementation == "eager"


# -- handles that are lost ---------------------------------------------------------------------------------------------


def test_a_model_is_given_back_without_its_handle() -> None:
    model = peft.get_peft_model(bert(), lora(task_type="SEQ_CLS", target_modules=["query"]))
    before = model.config._attn_implementation
    hk.attach(model, "hiddenkey", stock_dropout="off")
    gc.collect()
    hk.detach(model)
    hk.detach(model)
    assert model.base_model.model.config._attn_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    handle = hk.attach(model, "hiddenkey", stock_dropout="off")
    hk.detach(model)
    with pytest.raises(hk.StateError, match="detached"):
        handle.loss()


def test_stages_of_training_are_trainers_of_one_model(tmp_path: Any) -> None:
    model = bert()
    data = [{"input_ids": [5, n + 6, 7], "labels": n % 2} for n in range(8)]
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    options = {"args": arguments, "train_dataset": data, "stock_dropout": "off"}
    first = hk.HiddenKeyTrainer(model=model, config=hk.HiddenKeyConfig(), **options)
    first.train()
    hk.HiddenKeyTrainer(model=model, config="dropkey-column", **options).train()
    with pytest.raises(hk.StateError, match="this handle is detached"):
        first.train()
    hk.detach(model)
    hk.attach(model, "hiddenkey", stock_dropout="off")  # one's own is not taken away
    with pytest.raises(hk.StateError, match=r"trainer\.handle.*hiddenkey_rs\.detach\(model\)"):
        hk.HiddenKeyTrainer(model=model, config="dropkey-column", **options)


def test_a_run_that_begins_anew_counts_anew(tmp_path: Any) -> None:
    """``auto_find_batch_size`` starts the loop again with half the batch: what the first try added up is gone."""
    data = [{"input_ids": [5, n + 6, 7], "labels": n % 2} for n in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, logging_steps=1, auto_find_batch_size=True,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer = hk.HiddenKeyTrainer(
        model=bert(), args=arguments, train_dataset=data, config="hiddencut-element", stock_dropout="off"
    )
    own, tries = trainer.training_step, []

    def short_of_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("CUDA out of memory.")
        return found

    trainer.training_step = types.MethodType(short_of_memory, trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    assert len(logged) == 2
    assert all(entry["task_loss"] == pytest.approx(entry["loss"], abs=1e-4) for entry in logged)


@pytest.mark.parametrize("ids", [[[1, 2], [3]], torch.tensor([1.0, 2.0], dtype=torch.bfloat16)])
def test_sample_ids_of_other_kinds_are_one_error(ids: Any) -> None:
    handle = hk.attach(bert(), "hiddenkey", stock_dropout="off")
    with pytest.raises(hk.DataError, match="sample ids must be integers of shape"), handle.step(0, ids):
        pass


def test_groups_of_shared_layers_are_reported_by_what_ran() -> None:
    config = transformers.AlbertConfig(
        **SHAPE | {"num_hidden_layers": 4}, embedding_size=16, num_hidden_groups=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    handle = hk.attach(transformers.AlbertForSequenceClassification(config).train(), "hiddenkey-minus")
    with handle.step(0, IDS):
        handle.loss(input_ids=tokens(), labels=torch.tensor([0, 1]))
    assert all(row.measured is not None for row in handle.report().rows)
    assert {row.layer for row in handle.report().rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_a_mask_of_one_row_rescues_as_a_mask_of_tokens_does(form: str) -> None:
    """The plan knows of documents' lengths, and a (B, 1, 1, K) mask may forbid more than they say."""
    model = bert()
    told = torch.zeros(8, 16, dtype=torch.long)
    told[:, :2] = 1
    row = told[:, None, None].bool()
    row = row if form == "bool" else torch.zeros(row.shape).masked_fill(~row, float("-inf"))
    handle = hk.attach(model, hk.HiddenKeyConfig.preset("dropkey-column", rate=0.5))
    seen = []
    for mask in (told, row):
        handle.reset_counts()
        with handle.step(0, range(8)):
            hidden = model.bert(input_ids=tokens(8, 16), attention_mask=mask).last_hidden_state
        seen.append((hidden[:, :2], handle.realised()["attention"]))
    assert seen[0][1] == pytest.approx(seen[1][1], abs=0.25)
    assert not (seen[1][0].abs().sum(-1) == 0).any()
    plan = hk.plan_step(handle.config, 0, range(8), [16] * 8, layers=2, heads=4)
    lost = [not plan.mask(0, "attention").to_bool()[n, h, 0, :2].any() for n in range(8) for h in range(4)]
    assert any(lost), "the case that this is about"
    assert seen[1][1] < 0.4, "rows that lost both keys keep their own"


def test_masks_of_pairs_are_bool_or_numbers() -> None:
    handle = hk.attach(llama(), "dropkey-column")
    mask = torch.ones(2, 1, 8, 8, dtype=torch.long).tril()
    with handle.step(0, IDS), pytest.raises(hk.DataError, match=r"bool .* \(got torch.int64\); give mask.bool\(\)"):
        handle.model(input_ids=tokens(), attention_mask=mask)


def test_wrappers_that_checkpoint_and_offload_hold_the_layer() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

    model = llama(use_cache=False)
    batch = {"input_ids": tokens(), "labels": tokens()}
    handle = hk.attach(model, "hiddencut-element")
    expected = _losses(handle, batch)
    model.model.layers[0] = offload_wrapper(checkpoint_wrapper(model.model.layers[0]))
    assert _losses(handle, batch) == expected


def test_a_trainer_that_is_refused_takes_nothing_away(tmp_path: Any) -> None:
    model = bert()
    data = [{"input_ids": [5, n + 6, 7], "labels": n % 2} for n in range(8)]
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    options = {"args": arguments, "train_dataset": data, "stock_dropout": "off"}
    first = hk.HiddenKeyTrainer(model=model, config="hiddencut-element", **options)
    with pytest.raises(hk.ConfigError):
        hk.HiddenKeyTrainer(model=model, config=hk.HiddenKeyConfig(layers=[99]), **options)
    first.train()
    assert first.handle.session.attached
    with pytest.raises(hk.ConfigError):  # late, by the Trainer itself
        hk.HiddenKeyTrainer(
            model=model, config="dropkey-column", loader="hiddenkey", **{**options, "train_dataset": iter(data)}
        )
    first.train()
    hk.HiddenKeyTrainer(model=model, config="dropkey-column", **options)  # and it may still be taken over
    with pytest.raises(hk.UnsupportedModelError, match="only transformers models"):
        hk.HiddenKeyTrainer(model={}, config="dropkey-column", **options)


def test_labels_that_are_shifted_already_are_refused() -> None:
    handle = hk.attach(llama(), "none")
    with (
        handle.step(0, IDS),
        pytest.raises(hk.DataError, match=r"got shift_labels of shape \(2, 8\)\); pass labels alone"),
    ):
        handle.loss(input_ids=tokens(), labels=tokens(), shift_labels=tokens())


def test_a_decoder_may_be_given_embeddings() -> None:
    model = families.build("bart")
    batch = families.batch("bart")
    inputs = model.get_input_embeddings()(model.prepare_decoder_input_ids_from_labels(batch["labels"])).detach()
    handle = hk.attach(model, "none", stock_dropout="off")
    with handle.step(0, [5, 6, 7]):
        expected = handle.loss(**batch)
        found = handle.loss(**batch, decoder_inputs_embeds=inputs)
    torch.testing.assert_close(found, expected)


def test_what_was_last_keeps_no_graph() -> None:
    """After an error in backward it would hold on to the activations, and the next try lacked their memory."""
    handle = hk.attach(bert(), "hiddenkey")
    with handle.step(0, IDS):
        loss = handle.loss(input_ids=tokens(), labels=torch.tensor([0, 1]))
    assert handle.last is not None
    assert float(handle.last.loss) == float(loss)
    assert handle.last.loss.grad_fn is None
    assert handle.last.outputs is None
    with handle.step(1, IDS), pytest.raises(hk.DataError):
        handle.loss(input_ids=tokens())
    assert handle.last is None


def test_a_pass_beside_the_wrapper_of_ranks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_warned_ranks", False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    handle = hk.attach(bert(), "dropkey-column")
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
    with warnings.catch_warnings(), handle.step(0, IDS):
        warnings.simplefilter("error")
        handle.compute(batch, model=handle.model)
        with torch.no_grad():
            handle.loss(**batch)
    with (
        pytest.warns(
            UserWarning, match=r"on each of 2 ranks, .* not averaged; use handle.compute\(batch, model=WRAPPER"
        ),
        handle.step(0, IDS),
    ):
        handle.loss(**batch)
    with warnings.catch_warnings(), handle.step(0, IDS):
        warnings.simplefilter("error")
        handle.loss(**batch)


@pytest.mark.parametrize(
    ("repeat", "message"),
    [
        (
            lambda layers: layers.__setitem__(1, layers[0]),
            r"one layer module is .* \(got model.layers.0 and model.layers.1\)",
        ),
        (
            lambda layers: setattr(layers[1], "mlp", layers[0].mlp),
            r"one ffn module .*model.layers.0.mlp and .*; give each",
        ),
        (
            lambda layers: setattr(layers[1], "self_attn", layers[0].self_attn),
            r"one attention module .*0.self_attn and",
        ),
    ],
)
def test_modules_that_run_at_several_depths_are_refused(repeat: Any, message: str) -> None:
    model = llama()
    repeat(model.model.layers)
    with pytest.raises(hk.UnsupportedModelError, match=message):
        hk.attach(model, "hiddenkey")


def test_a_head_that_drops_nothing_may_be_changed() -> None:
    model = bert(num_labels=3)
    handle = hk.attach(model, "dropkey-column")
    model.classifier = torch.nn.Linear(32, 3)
    with handle.step(0, IDS):
        handle.loss(input_ids=tokens(), labels=torch.tensor([0, 2]))
    hk.detach(torch.nn.DataParallel(model))
    assert not handle.session.attached


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_models_that_accelerate_prepared(precision: str) -> None:
    """Its wrapper casts what comes out; a step through it is the step of the model alone, under the same autocast."""
    batch = {"input_ids": torch.arange(5, 21).reshape(2, 8), "labels": torch.tensor([0, 1])}

    def step(handle: hk.Handle, **how: Any) -> torch.Tensor:
        with handle.step(0, IDS):
            return handle.compute(batch, num_items=2, **how).loss

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        prepared = bert()
        handle = hk.attach(prepared, stock_dropout="off")
        prepared = accelerator.prepare(prepared)
        loss = step(handle, model=prepared)
        accelerator.backward(loss)
        accelerator.free_memory()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    model = bert()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = step(hk.attach(model, stock_dropout="off"))
    expected.backward()
    assert torch.equal(loss, expected)
    for found, wanted in zip(prepared.parameters(), model.parameters(), strict=True):
        assert found.grad is None if wanted.grad is None else torch.equal(found.grad, wanted.grad)
