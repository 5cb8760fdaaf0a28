"""Bad input to attach, step and loss: one typed error that names the value and the way out, and an untouched model."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers as tf

import families
import hiddenkey_rs as hk


def state(model: torch.nn.Module) -> tuple[object, ...]:
    dropouts = tuple(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return model.config._attn_implementation, dropouts, hooks


@pytest.fixture
def model() -> tf.PreTrainedModel:
    return families.build("bert")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hk.HiddenKeyConfig(layers=[7]), "7"),
        (hk.HiddenKeyConfig(layers=["decoder.0"]), "decoder.0"),
        (hk.HiddenKeyConfig(rate_pattern={"nowhere": 0.2}), "nowhere"),
        (
            hk.HiddenKeyConfig(layers=[1], rate_pattern={r"layer\.0": 0.2}),
            r"drop nothing \(got 'layer\\\\.0': 0.2, layers=\(1,\)\)",
        ),
        (
            hk.HiddenKeyConfig(hidden=None, rate_pattern={r"output\.dense": 0.2}),
            "matches only layers and modules that drop nothing",
        ),
        (hk.HiddenKeyConfig(rate_pattern={"classifier": 0.2}), "matches only layers and modules that drop nothing"),
    ],
)
def test_a_config_that_does_not_fit_leaves_the_model_untouched(model, config, message) -> None:
    before = state(model)
    with pytest.raises(hk.ConfigError, match=message):
        hk.attach(model, config, stock_dropout="off")
    assert state(model) == before


def test_a_decoder_of_one_layer_has_no_latter_half() -> None:
    model = families.build("llama", num_hidden_layers=1)
    with pytest.raises(hk.ConfigError, match=r"reaches no layer.*layers='all'"):
        hk.attach(model, hk.HiddenKeyConfig())


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "bert-base-uncased", None])
def test_something_that_is_no_model(thing) -> None:
    with pytest.raises(hk.UnsupportedModelError, match="only transformers models"):
        hk.attach(thing, hk.HiddenKeyConfig())


def test_unknown_settings_name_the_choices(model) -> None:
    with pytest.raises(hk.ConfigError, match=r"unknown stock_dropout \(got 'maybe'\); use one of keep, off"):
        hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="maybe")
    with pytest.raises(hk.ConfigError, match=r"unknown impl \(got 'fast'\)"):
        hk.attach(model, hk.HiddenKeyConfig(), impl="fast")
    with pytest.raises(hk.ConfigError, match=r"hiddenkey-minus"):
        hk.attach(model, "hiddenkey-minos")
    assert state(model)[2] == 0


def test_attaching_twice(model) -> None:
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    with pytest.raises(hk.StateError, match="attached to this model already"):
        hk.attach(model, hk.HiddenKeyConfig())
    handle.detach()
    handle.detach()
    hk.attach(model, hk.HiddenKeyConfig()).detach()
    hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")  # nobody keeps the handle
    gc.collect()
    with pytest.raises(hk.StateError, match="attached to this model already"):
        hk.attach(model, hk.HiddenKeyConfig())


def test_a_dead_model_is_forgotten_at_once() -> None:
    """Its id() may come back for a new model before the cycle collector has taken its hooks."""
    from hiddenkey_rs.attachment.handle import _ATTACHED

    before = len(_ATTACHED)
    gc.disable()
    try:
        model = families.build("bert")
        handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
        assert len(_ATTACHED) == before + 1
        del model, handle
        assert len(_ATTACHED) == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("Bloom", "boolean mask would change its results"),
        ("Falcon", "does not go through"),
        ("GPTJ", "does not go through"),
        ("DebertaV2", "never calls"),
    ],
)
def test_families_outside_the_interface_are_refused_with_the_reason(family: str, reason: str) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    if family == "GPTJ":
        small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "rotary_dim": 4}
    model = getattr(tf, f"{family}Model")(getattr(tf, f"{family}Config")(**small))
    with pytest.raises(hk.UnsupportedModelError, match=rf"{reason}.*got model_type"):
        hk.attach(model, hk.HiddenKeyConfig())


def test_an_unknown_family_is_told_which_there_are() -> None:
    model = tf.CLIPTextModel(
        tf.CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(
        hk.UnsupportedModelError, match=r"clip_text_model.*supported families: albert, apertus, bart, bert"
    ):
        hk.attach(model, hk.HiddenKeyConfig())


def test_t5_needs_the_transformers_that_gave_it_the_interface() -> None:
    from hiddenkey_rs.attachment.families import family_of

    with pytest.raises(hk.UnsupportedModelError, match=r"got transformers 5\.14\.1.*transformers>=5\.16"):
        family_of("t5", "5.14.1")
    assert family_of("t5", "5.16.0").encoder_decoder
    assert family_of("t5", "6.0.dev0").encoder_decoder


def test_chunked_feed_forward_is_refused() -> None:
    with pytest.raises(hk.UnsupportedModelError, match=r"chunk_size_feed_forward=2"):
        hk.attach(families.build("bert", chunk_size_feed_forward=2), hk.HiddenKeyConfig())


@pytest.mark.parametrize(
    ("sample_ids", "message"),
    [
        (None, r"sample ids are missing \(got None\)"),
        ([0, 1], r"got 3 rows, 2 sample ids"),
        ([0, 1, 2, 3], r"got 3 rows, 4 sample ids"),
        ([0.0, 1.0, 2.0], r"must be integers .*float64"),
        ([True, False, True], r"must be integers .*bool"),
        ([0, 1, -1], r"got -1"),
        ([0, 1, 1 << 40], rf"got {1 << 40}"),
        ([[0, 1, 2]], r"packed sample ids must have the shape of the batch"),
        (["a", "b", "c"], r"must be integers"),
    ],
)
def test_sample_ids(model, sample_ids, message) -> None:
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    with pytest.raises(hk.DataError, match=message), handle.step(0, sample_ids):
        handle.loss(**families.batch("bert"))
    with handle.step(0, [1, 2, 3]):
        handle.loss(**families.batch("bert")).backward()


@pytest.mark.parametrize("step", [-1, 1 << 32, 0.5, True, None])
def test_steps(model, step) -> None:
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    with pytest.raises(hk.ConfigError, match=r"step must be an integer in \[0, 2\*\*32\)"), handle.step(step, [0]):
        pass


def test_a_training_pass_outside_a_step(model) -> None:
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    with pytest.raises(hk.StateError, match=r"outside a step, so its sample ids are missing"):
        model(**families.batch("bert"))
    with pytest.raises(hk.StateError, match=r"no step is active"):
        handle.loss(**families.batch("bert"))
    with handle.step(0, [0, 1, 2]), pytest.raises(hk.StateError, match="a step is active already"), handle.step(1, [0]):
        pass
    handle.detach()
    with pytest.raises(hk.StateError, match="detached"), handle.step(0, [0]):
        pass


def test_labels_missing(model) -> None:
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    batch = {name: value for name, value in families.batch("bert").items() if name != "labels"}
    message = r"the loss needs labels \(got a batch with input_ids, attention_mask\); pass labels"
    with handle.step(0, [0, 1, 2]), pytest.raises(hk.DataError, match=message):
        handle.loss(**batch)


def test_consistency_where_nothing_differs(model) -> None:
    with pytest.raises(hk.ConfigError, match="two passes of the consistency term would be identical"):
        hk.attach(model, hk.HiddenKeyConfig.preset("r-drop"), stock_dropout="off")
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout)), "the refusal gave dropout back"


def test_multi_label_heads_have_no_consistency(model) -> None:
    model.config.problem_type = "multi_label_classification"
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    with pytest.raises(hk.ConfigError, match="multi-label"):
        hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == rates
    hk.attach(model, hk.HiddenKeyConfig(consistency=None), stock_dropout="off").detach()


def test_multi_label_heads_are_known_by_their_first_labels(model) -> None:
    model.config.problem_type = None
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    ids = torch.ones(2, 5, dtype=torch.long)
    with handle.step(0, sample_ids=[0, 1]), pytest.raises(hk.ConfigError, match="multi-label"):
        handle.loss(input_ids=ids, labels=torch.ones(2, model.config.num_labels))


def test_replicas_of_a_model_are_refused(model) -> None:
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.tensor([0, 1])}
    with handle.step(0, sample_ids=[0, 1]), pytest.raises(hk.UnsupportedModelError, match="torchrun"):
        handle.compute(batch, model=torch.nn.DataParallel(model))


def test_wrapped_and_compiled_models_must_come_later(model) -> None:
    with pytest.raises(hk.UnsupportedModelError, match="attach first, then compile"):
        hk.attach(torch.compile(model, backend="eager"), hk.HiddenKeyConfig())


def test_forward_code_replaced_by_another_library(model, monkeypatch) -> None:
    """A library that swaps the attention's forward bypasses the interface: the first training pass says so."""
    attention = model.bert.encoder.layer[1].attention.self
    monkeypatch.setattr(attention, "forward", lambda hidden_states, *args, **kwargs: (hidden_states, None))
    handle = hk.attach(model, hk.HiddenKeyConfig.preset("dropkey-column"), stock_dropout="off")
    with (
        handle.step(0, [0, 1, 2]),
        pytest.raises(hk.UnsupportedModelError, match=r"never called.*layer.1.attention.self"),
    ):
        handle.loss(**families.batch("bert"))


def test_the_models_own_dropout_is_warned_of_once(model, monkeypatch) -> None:
    from hiddenkey_rs.attachment import handle as module

    monkeypatch.setattr(module, "_warned_stock", False)
    with pytest.warns(UserWarning, match='stock_dropout="off"'):
        hk.attach(model, hk.HiddenKeyConfig()).detach()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hk.attach(model, hk.HiddenKeyConfig()).detach()
