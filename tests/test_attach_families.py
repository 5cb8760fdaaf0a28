"""Every family: masks land where the definition says, forward and gradient, and nothing else changes.

The oracle is the stock model with its attention swapped for a slow one that reads its masks from the NumPy
reference; it knows layers only by the order of the calls.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import sdpa_mask

import families
import hiddenkey_rs as hk
from families import DECODERS, ENCODER_DECODERS, FAMILIES, OWN
from hiddenkey_rs.attachment import interface
from reference import masks as reference

SAMPLES = np.array([11, (1 << 33) + 5, 3])
RATE = 0.4
STEP, SEED = 7, 1234

# The last linear layer of each family's FFN, by the end of its name: zero it and the FFN outputs zero.
FFN_OUTPUT = {
    **dict.fromkeys(FAMILIES, ".mlp.down_proj"),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "camembert", "xlm-roberta-xl"], r".output.dense"),
    **dict.fromkeys(["roberta-prelayernorm", "ernie", "data2vec-text"], r".output.dense"),
    "distilbert": ".ffn.lin2",
    "albert": ".ffn_output",
    "modernbert": ".mlp.Wo",
    "gpt2": ".mlp.c_proj",
    "gpt_neox": ".mlp.dense_4h_to_h",
    "opt": ".fc2",
    **dict.fromkeys(["mixtral", "gpt_oss", "qwen3_moe"], ".mlp.experts"),
    "qwen2_moe": (".mlp.experts", ".shared_expert.down_proj"),
    "deepseek_v3": (".mlp.experts", ".mlp.shared_experts.down_proj", ".mlp.down_proj"),
    "phi": ".mlp.fc2",
    "starcoder2": ".mlp.c_proj",
    **dict.fromkeys(ENCODER_DECODERS, ".fc2"),
    **dict.fromkeys(["t5", "mt5"], ".DenseReluDense.wo"),
}


class SlowAttention:
    """Eager attention in float64 with dropped columns; the masks come from the reference, layers from call order."""

    def __init__(self, family: str, samples: np.ndarray, lengths: list[int]) -> None:
        self.family, self.samples, self.lengths = family, samples, lengths
        self.calls: dict[str, int] = {}

    def site(self, module: nn.Module, causal: bool, queries: int, keys: int) -> str:
        if self.family not in ENCODER_DECODERS:
            return "attention"
        if queries != keys:
            return "cross-attention"
        return "decoder-attention" if causal else "attention"

    def keep(self, site: str, heads: int, keys: int) -> torch.Tensor:
        layer = self.calls.get(site, 0)
        self.calls[site] = layer + 1
        drawn = reference.column(SEED, STEP, 0, layer, site, self.samples, keys, RATE, heads=heads)
        return torch.from_numpy(np.asarray(drawn, dtype=bool).reshape(len(self.samples), heads, 1, keys))

    def __call__(self, module, query, key, value, mask, scaling=None, dropout=0.0, **extra):
        causal = bool(mask is not None and not mask[0, 0, 0].all() and mask[0, 0, -1].all() and mask.shape[2] > 1)
        site = self.site(module, causal and not mask[0, 0, 0, 1], query.shape[2], key.shape[2])
        groups = query.shape[1] // key.shape[1]
        keep = self.keep(site, key.shape[1], key.shape[2]).repeat_interleave(groups, dim=1)
        scores = query.double() @ key.double().repeat_interleave(groups, dim=1).transpose(2, 3)
        scores = scores * (scaling if scaling is not None else query.shape[-1] ** -0.5)
        if extra.get("position_bias") is not None:
            scores = scores + extra["position_bias"].double()
        if extra.get("softcap") is not None:
            scores = extra["softcap"] * torch.tanh(scores / extra["softcap"])
        weights = self.weights(scores, self.kept(mask, keep, scores.shape, site), extra.get("s_aux"))
        return (weights @ value.double().repeat_interleave(groups, dim=1)).transpose(1, 2).to(query.dtype), None

    def kept(self, mask: torch.Tensor, keep: torch.Tensor, shape: torch.Size, site: str) -> torch.Tensor:
        allowed = mask.expand(shape)
        kept = (allowed & keep).clone()
        for row, head, query in (~kept.any(-1) & allowed.any(-1)).nonzero().tolist():
            own = site != "cross-attention" and allowed[row, head, query, query]
            kept[row, head, query] = allowed[row, head, query]
            if own:
                kept[row, head, query] = False
                kept[row, head, query, query] = True
        return kept

    def weights(self, scores: torch.Tensor, kept: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        exponentials = (scores - scores.amax(-1, keepdim=True).detach()).exp() * kept
        total = exponentials.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (sinks.double().view(1, -1, 1, 1) - scores.amax(-1, keepdim=True).detach()).exp()
        return exponentials / total.masked_fill(total == 0, 1)


def config(**parts: object) -> hk.HiddenKeyConfig:
    defaults = {"attention": None, "hidden": None, "consistency": None, "layers": "all", "seed": SEED}
    return hk.HiddenKeyConfig(**{**defaults, **parts})


def off(model: nn.Module) -> nn.Module:
    """Without the model's own dropout, which would draw differently in two runs."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_columns_equal_the_reference_forward_and_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = off(families.build(family))
    batch = families.batch(family)
    twin = copy.deepcopy(model)
    handle = hk.attach(model, config(attention=hk.AttentionDrop(rate=RATE)), stock_dropout="off")
    with handle.step(STEP, SAMPLES):
        loss = model(**batch, use_cache=False).loss if family not in families.ENCODERS else model(**batch).loss
    loss.backward()

    slow = SlowAttention(family, SAMPLES, batch["attention_mask"].sum(1).tolist())
    AttentionInterface.register("slow_reference", slow)
    full = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    AttentionMaskInterface.register("slow_reference", lambda *a, **k: sdpa_mask(*a, **{**k, **full}))
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "slow_reference"
    expected = twin(**batch, use_cache=False).loss if family not in families.ENCODERS else twin(**batch).loss
    expected.backward()

    # float32 against float64 attention through four layers
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    for name, grad in gradients(twin).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=2e-3, atol=2e-5, msg=name)
    assert set(slow.calls.values()) == {families.LAYERS}


def ffn_outputs(model: nn.Module, family: str) -> list[nn.Parameter]:
    """The weights of the last linear layer of every FFN."""
    return [
        parameter
        for name, module in model.named_modules()
        if name.endswith(FFN_OUTPUT[family]) and not name.endswith("attention.output.dense")
        for parameter in module.parameters()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_hiddencut_acts_on_the_ffn_output_before_the_residual(family: str) -> None:
    """Dropping every token vector equals an FFN whose last linear layer is zero."""
    model = off(families.build(family))
    batch = families.batch(family)
    with torch.no_grad():
        for parameter in ffn_outputs(model, family):
            parameter.mul_(100.0)  # as they begin, an FFN hardly shows in the loss
    twin = copy.deepcopy(model)
    undropped = model(**batch).loss
    for parameter in ffn_outputs(twin, family):
        nn.init.zeros_(parameter)
    cut = hk.HiddenDrop(pattern="column", rate=1 - 2**-16)
    handle = hk.attach(model, config(hidden=cut), stock_dropout="off")
    drawn: list[bool] = []
    handle.record_masks(lambda mask: drawn.append(bool(mask.keep.any())))
    with handle.step(0, SAMPLES):
        loss = model(**batch).loss
    assert not any(drawn), "the rate leaves one decision in 65536: choose another step"
    torch.testing.assert_close(loss, twin(**batch).loss, rtol=1e-5, atol=1e-6)
    assert abs(float(undropped - loss)) > 1e-4 * float(loss), "or the test sees no FFN"


@pytest.mark.parametrize("family", FAMILIES)
def test_inactive_is_the_stock_model_bit_for_bit(family: str) -> None:
    """Rate 0, eval, no_grad in training mode, and after detach."""
    model = families.build(family)
    batch = families.batch(family)
    stock_config = model.config._attn_implementation
    model.eval()
    expected = model(**batch).logits
    with torch.no_grad():  # SDPA may pick another kernel where no gradient is recorded
        unrecorded = model(**batch).logits
    zero = hk.attach(model, config(attention=hk.AttentionDrop(rate=0.0), hidden=hk.HiddenDrop(rate=0.0)))
    assert torch.equal(model(**batch).logits, expected)
    zero.detach()
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    assert torch.equal(model(**batch).logits, expected)
    model.train()
    with torch.no_grad(), handle.step(0, SAMPLES):
        assert torch.equal(model(**batch).logits, unrecorded)
    handle.detach()
    assert model.config._attn_implementation == stock_config
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    model.eval()
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("family", DECODERS + ENCODER_DECODERS)
def test_generation_is_the_stock_models(family: str) -> None:
    model = families.build(family)
    batch = {name: value for name, value in families.batch(family, side="left").items() if name != "labels"}
    model.eval()
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False)
    handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), expected)
    model.train()
    with handle.step(0, SAMPLES):
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize(
    ("family", "reentrant"),
    [(family, reentrant) for family in FAMILIES for reentrant in (False, True) if family in OWN or not reentrant],
)
def test_checkpoint_replay_draws_the_same_masks(family: str, reentrant: bool) -> None:
    """Two micro-batches with one backward: a replay that used the latest masks would be wrong."""
    if family == "albert":
        pytest.skip("transformers offers no activation checkpointing for ALBERT")
    results = []
    for checkpointing in (False, True):
        model = off(families.build(family))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        handle = hk.attach(model, config(attention=hk.AttentionDrop(rate=RATE), hidden=hk.HiddenDrop(rate=RATE)))
        total = torch.zeros(())
        for step in (0, 1):
            with handle.step(step, SAMPLES):
                total = total + handle.loss(**families.batch(family, seed=step))
        total.backward()
        results.append(gradients(model))
    # Reentrant checkpoints add up the gradients of what all decoder layers read (encoder output, tied embeddings) in
    # another order; everything else is bit-equal.
    tolerance = 1e-5 if reentrant and family in ENCODER_DECODERS else 0.0
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=tolerance, atol=tolerance / 10, msg=name)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [(family, "column") for family in FAMILIES]
    + [(family, pattern) for family in OWN for pattern in ("element", "span")],
)
def test_padding_side_and_width_do_not_change_the_masks(family: str, pattern: str) -> None:
    """What each example's own tokens see: the masks recorded for right, left and wider padding are the same."""
    seen = []
    model = off(families.build(family))
    for side, length in (("right", 9), ("left", 9), ("right", 12)):
        drops = config(attention=hk.AttentionDrop(pattern=pattern, rate=RATE), hidden=hk.HiddenDrop(pattern, rate=RATE))
        handle = hk.attach(model, drops)
        record: dict[tuple[object, int], list[np.ndarray]] = {}

        def note(drawn, record=record) -> None:
            for sample, mask in zip(drawn.samples.tolist(), drawn.keep.numpy(), strict=True):
                record.setdefault((drawn.key, sample), []).append(mask)

        handle.record_masks(note)
        batch = families.batch(family, side=side)
        if length > 9:
            batch = {k: nn.functional.pad(v, (0, 3)) if v.dim() == 2 and k != "labels" else v for k, v in batch.items()}
            if family in DECODERS:
                batch["labels"] = nn.functional.pad(batch["labels"], (0, 3), value=-100)
        with handle.step(0, SAMPLES):
            handle.loss(**batch)
        handle.detach()
        seen.append(record)
    for other in seen[1:]:
        assert other.keys() == seen[0].keys()
        for name, masks in seen[0].items():
            for mine, theirs in zip(masks, other[name], strict=True):
                assert np.array_equal(mine, theirs)


def test_albert_counts_its_depth_by_calls() -> None:
    model = off(families.build("albert"))
    handle = hk.attach(model, config(attention=hk.AttentionDrop(rate=RATE), hidden=hk.HiddenDrop(rate=RATE)))
    keys: list[tuple[str, int]] = []
    handle.record_masks(lambda mask: keys.append((mask.key.site, mask.key.layer)))
    with handle.step(0, SAMPLES):
        handle.loss(**families.batch("albert"))
    assert keys == [(site, depth) for depth in range(families.LAYERS) for site in ("attention", "ffn")]


def test_decoders_drop_in_their_latter_half_by_default() -> None:
    handle = hk.attach(families.build("llama"), hk.HiddenKeyConfig(), stock_dropout="off")
    assert {row.layer for row in handle.report().rows} == {2, 3}
    handle.detach()
    handle = hk.attach(families.build("t5"), hk.HiddenKeyConfig(), stock_dropout="off")
    layers: dict[str, set[int]] = {}
    for row in handle.report().rows:
        layers.setdefault(row.site, set()).add(row.layer)
    assert layers == {
        "attention": {0, 1, 2, 3},
        "ffn": {0, 1, 2, 3},
        "decoder-attention": {2, 3},
        "cross-attention": {2, 3},
        "decoder-ffn": {2, 3},
    }


def test_padded_targets_do_not_change_a_decoders_spans() -> None:
    """Seq2seq collators pad labels and send no decoder mask: lengths then come from the labels."""
    seen = []
    for width in (0, 4):
        handle = hk.attach(off(families.build("t5")), config(attention=hk.AttentionDrop(pattern="span", rate=RATE)))
        batch = families.batch("t5")
        batch["labels"][1, 5:] = -100
        batch["labels"] = nn.functional.pad(batch["labels"], (0, width), value=-100)
        record: dict[object, list[np.ndarray]] = {}
        handle.record_masks(lambda mask, record=record: record.setdefault(mask.key, []).append(mask.keep.numpy()))
        with handle.step(0, SAMPLES):
            handle.loss(**batch)
        seen.append(record)
    assert seen[0].keys() == seen[1].keys()
    assert all(np.array_equal(a, b) for key in seen[0] for a, b in zip(seen[0][key], seen[1][key], strict=True))


def test_an_attached_model_can_be_forgotten() -> None:
    import gc
    import weakref

    model = families.build("bert")
    hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_of_an_attached_model_says_that_it_is_not_attached() -> None:
    model = families.build("bert")
    hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    twin = copy.deepcopy(model)
    with pytest.raises(hk.StateError, match="a model that nothing is attached to"):
        twin(**families.batch("bert"))
    with pytest.raises(hk.StateError, match="says 'hiddenkey' already"):
        hk.attach(twin, hk.HiddenKeyConfig(), stock_dropout="off")
    twin.set_attn_implementation("sdpa")
    twin(**families.batch("bert"))


def test_a_copy_does_not_drop_what_the_original_drops() -> None:
    model = families.build("bert").train()
    handle = hk.attach(model, hk.HiddenKeyConfig.preset("hiddencut-element", rate=0.5), stock_dropout="off")
    twin, batch = copy.deepcopy(model), families.batch("bert")
    twin.set_attn_implementation("sdpa")
    with handle.step(0, sample_ids=range(len(batch["input_ids"]))):
        model(**batch)
    assert torch.equal(twin(**batch).logits, twin.eval()(**batch).logits)


@pytest.mark.parametrize(("places", "plain"), [([0, 1, 2, 3, 4, 5], True), ([0, 1, 2, 0, 1, 2], False)])
def test_a_window_over_packed_documents_says_more_than_a_window(places: list[int], plain: bool) -> None:
    """Kernels that know windows by themselves must not take such a mask for one, or documents would see each other."""
    seen: list[dict] = []
    AttentionMaskInterface.register("probe", lambda *args, **kwargs: seen.append(kwargs))
    model = families.build("mistral", sliding_window=4)
    model.config._attn_implementation = "probe"
    masking_utils.create_sliding_window_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(1, 6, 4),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.tensor([places]),
    )
    assert [interface._plain(**kwargs) for kwargs in seen] == [plain]


def test_two_models_of_one_config_are_told_apart() -> None:
    model = families.build("bert")
    hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
    other = type(model)(model.config)
    rates = [m.p for m in other.modules() if isinstance(m, torch.nn.Dropout)]
    with pytest.raises(hk.StateError, match="give each model its own config"):
        hk.attach(other, hk.HiddenKeyConfig(), stock_dropout="off")
    assert [m.p for m in other.modules() if isinstance(m, torch.nn.Dropout)] == rates


# The names of each family's own dropout rates, where its default is not already above 0.
STOCK = {
    "gpt_neox": ["attention_dropout", "hidden_dropout"],
    "modernbert": ["attention_dropout", "mlp_dropout", "embedding_dropout"],
    "opt": ["attention_dropout"],
    "bart": ["attention_dropout", "activation_dropout", "classifier_dropout"],
    "phi3": ["attention_dropout", "resid_pdrop", "embd_pdrop"],
}
STOCK |= {family: ["attention_dropout"] for family in (*DECODERS, "eurobert") if family not in (*STOCK, "gpt2")}


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_dropout_off_leaves_none_of_torchs_randomness(family: str) -> None:
    if family == "ernie4_5":
        pytest.skip("Ernie 4.5 has no dropout")
    model = families.build(family, **dict.fromkeys(STOCK.get(family, []), 0.5))
    batch = families.batch(family)
    handle = hk.attach(model, config(attention=hk.AttentionDrop(rate=RATE)), stock_dropout="keep")
    losses = []
    for _ in range(2):
        with handle.step(0, SAMPLES):
            losses.append(float(handle.loss(**batch).detach()))
    assert losses[0] != losses[1], "the model's own dropout should act here"
    handle.detach()
    handle = hk.attach(model, config(attention=hk.AttentionDrop(rate=RATE)), stock_dropout="off")
    losses = []
    for _ in range(2):
        with handle.step(0, SAMPLES):
            losses.append(float(handle.loss(**batch).detach()))
    assert losses[0] == losses[1]
