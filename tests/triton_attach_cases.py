"""Attached models on the Triton kernels, in the interpreter: equal to the reference. Run by tests/test_triton_attach.py."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import families
import hiddenkey_rs as hk

IDS = [5, 1 << 35, 7]


def step(model, config, batch, impl: str):
    handle = hk.attach(model, config, stock_dropout="off", impl=impl)
    with handle.step(3, IDS[: len(batch["input_ids"])]):
        loss = handle.loss(**batch)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, gradients, handle.realised()


PATTERNS = {
    "hiddenkey": hk.HiddenKeyConfig.preset("hiddenkey", rate=0.4),
    "elements": hk.HiddenKeyConfig(
        attention=hk.AttentionDrop(position="dropattention", pattern="element", rate=0.4, heads="query"),
        hidden=hk.HiddenDrop(pattern="span", rate=0.3),
        layers="all",
    ),
}


CASES = [
    ("bert", "hiddenkey", "right"),
    ("llama", "hiddenkey", "right"),
    ("gpt2", "elements", "right"),
    ("bart", "elements", "right"),
    ("modernbert", "hiddenkey", "right"),
    ("gemma3_text", "elements", "left"),
    ("deepseek_v3", "hiddenkey", "left"),
    ("qwen2_moe", "hiddenkey", "right"),
]


# What a layer computes is the same in each of them, and takes seconds here.
FEW = {"num_hidden_layers": 2}
MORE = {
    "gemma3_text": {**FEW, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2_moe": {**FEW, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "gpt2": {"n_layer": 2},
    "t5": {"num_layers": 2},
}


@pytest.mark.parametrize(("family", "pattern", "side"), CASES)
def test_equals_the_reference(family: str, pattern: str, side: str) -> None:
    model, batch = families.build(family, **MORE.get(family, FEW)), families.batch(family, rows=2, side=side)
    config = PATTERNS[pattern]
    expected = step(copy.deepcopy(model), config, batch, "reference")
    found = step(model, config, batch, "triton")
    # float32, summed in another order, through some layers
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=2e-3, atol=2e-5)
    assert set(found[2]) == set(expected[2])
    for site, rate in found[2].items():
        # queries of padding are counted by masks of pairs and not by documents
        assert rate == pytest.approx(expected[2][site], abs=0.1)


AUTO = [
    # (family, side of the padding, whether the kernels are called)
    ("bert", "right", True),
    ("bert", "left", False),
    ("llama", "none", True),
    ("bart", "right", True),
    ("t5", "right", False),
    ("gemma2", "left", False),
    ("gpt_oss", "right", False),
]


@pytest.mark.parametrize(("family", "side", "kernels"), AUTO)
def test_auto_on_a_device_takes_the_kernels_where_it_can(family: str, side: str, kernels: bool) -> None:
    model = families.build(family, **MORE.get(family, FEW))
    batch = families.batch(family, rows=2, side="right" if side == "none" else side)
    if side == "none":
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    expected = step(copy.deepcopy(model), PATTERNS["hiddenkey"], batch, "reference")
    calls = []

    def noted(*args, **how):
        calls.append(1)
        return attention(*args, **how)

    attention = hk.ops.triton_attention.attention
    with (
        patch.object(hk.ops.triton_launch, "on_cuda", lambda device: True),
        patch.object(hk.ops.triton_attention, "attention", noted),
    ):
        found = step(model, PATTERNS["hiddenkey"], batch, "auto")
    assert bool(calls) == kernels
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=2e-3, atol=2e-5)


def test_auto_makes_the_mask_of_rows_that_no_run_of_tokens_describes() -> None:
    model, batch = families.build("bert", **FEW), families.batch("bert")
    batch["attention_mask"][0, 2] = 0
    expected = step(copy.deepcopy(model), PATTERNS["hiddenkey"], batch, "reference")
    with patch.object(hk.ops.triton_launch, "on_cuda", lambda device: True):
        found = step(copy.deepcopy(model), PATTERNS["hiddenkey"], batch, "auto")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=2e-3, atol=2e-5)
    with pytest.raises(hk.ConfigError, match="side by side"):
        step(model, PATTERNS["hiddenkey"], batch, "triton")


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_keys_of_a_cache_are_refused(impl: str) -> None:
    model, batch = families.build("llama"), families.batch("llama")
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model.eval()(batch["input_ids"], past_key_values=cache, use_cache=True)
    del batch["attention_mask"]
    with (
        patch.object(hk.ops.triton_launch, "on_cuda", lambda device: True),
        pytest.raises(hk.DataError, match="train with use_cache=False"),
    ):
        step(model.train(), PATTERNS["hiddenkey"], {**batch, "past_key_values": cache, "use_cache": True}, impl)


def test_counts_are_the_masks_own() -> None:
    model, batch = families.build("llama"), families.batch("llama", rows=1)
    config = PATTERNS["hiddenkey"]
    rates = []
    for impl in ("reference", "triton"):
        handle = hk.attach(copy.deepcopy(model), config, stock_dropout="off", impl=impl)
        with handle.step(3, IDS[:1]):
            handle.loss(**batch)
        rates.append(handle.realised())
    assert rates[0] == rates[1]


def test_packed_rows_and_what_cannot_be_computed() -> None:
    model = families.build("llama")
    ids = torch.randint(5, 90, (1, 9))
    documents = [[4, 4, 4, 4, 4, 9, 9, 9, -1]]
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])}
    handle = hk.attach(model, PATTERNS["hiddenkey"], stock_dropout="off", impl="triton")
    with handle.step(0, documents), pytest.raises(hk.ConfigError, match="sample ids do not say so"):
        handle.loss(**batch, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    with handle.step(0, documents), pytest.raises(hk.ConfigError, match="documents that see each other"):
        handle.loss(**{**batch, "attention_mask": torch.tensor([[1] * 8 + [0]])})
    handle.detach()
    t5 = hk.attach(families.build("t5"), PATTERNS["hiddenkey"], stock_dropout="off", impl="triton")
    with t5.step(0, IDS), pytest.raises(hk.ConfigError, match="it has no additive bias"):
        t5.loss(**families.batch("t5"))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_rows_that_a_collator_packed(family: str) -> None:
    """No 2-D mask beside them, positions that restart: transformers says who sees whom by a mask of pairs, once."""
    model = families.build(family, **MORE.get(family, FEW))
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    documents = [[4, 4, 4, 4, 4, 9, 9, 9, -1], [6, 6, 6, 8, 8, 8, 8, 8, 8]]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 3, 4, 5]])
    labels = ids.masked_fill(torch.tensor(documents) < 0, -100)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
    masks, found = [], {}
    for impl in ("reference", "triton"):
        copied = copy.deepcopy(model)
        handle = hk.attach(copied, PATTERNS["hiddenkey"], stock_dropout="off", impl=impl)
        real = ALL_MASK_ATTENTION_FUNCTIONS["hiddenkey"]
        for number in range(2):
            seen: list[bool] = []
            with patch.dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, hiddenkey=_noting(real, seen)):
                with handle.step(number, documents):
                    loss = handle.loss(**batch)
                if number:
                    loss.backward()
            masks.append(any(seen))
        found[impl] = (loss, {n: p.grad for n, p in copied.named_parameters() if p.grad is not None})
        handle.detach()
    assert masks == [True, True, True, False]
    torch.testing.assert_close(found["triton"][0], found["reference"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["triton"][1], found["reference"][1], rtol=2e-3, atol=2e-5)
    handle = hk.attach(model, PATTERNS["hiddenkey"], stock_dropout="off", impl="triton")
    for wrong in (documents[::-1], [[3] * 9, documents[1]], [[3] * 9, [5] * 9]):
        with handle.step(0, wrong), pytest.raises(hk.ConfigError, match="sample ids do not say so"):
            handle.loss(**batch)


def _noting(real, seen: list[bool]):
    def function(*args, **kwargs):
        mask = real(*args, **kwargs)
        seen.append(mask is not None)
        return mask

    return function
