"""Attention a block of queries at a time: equal to attention under the whole mask, forward, gradient and counts."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
import hiddenkey_rs as hk
from hiddenkey_rs import ConfigError, ops
from hiddenkey_rs.ops import api, blocked, reference

# Two orders of summation in float32; and 8 bits of mantissa.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def masks(kind: str, batch: int, length: int) -> torch.Tensor:
    """Allowed pairs: bool (1 or batch, 1, length, length)."""
    if kind == "causal":
        return reference.causal(length, length)
    if kind == "window":
        return reference.sliding_window(length, length, 5)
    causal = reference.causal(length, length).expand(batch, -1, -1, -1)
    if kind == "packed":
        document = torch.arange(length) // 13
        return causal & (document[:, None] == document)
    pad = torch.arange(length) >= torch.arange(batch)[:, None] * 3  # left padding: rows that see nothing
    return causal & pad[:, None, None] if kind == "left" else causal & pad.flip(1)[:, None, None]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["causal", "window", "packed", "left", "right"]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.sampled_from([1, 3, 17, 64, 65, 127, 129]),
    pattern=st.sampled_from(["column", "element"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    rate=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    rescue=st.sampled_from(["own", "all"]),
)
def test_equals_attention_under_the_mask(kind, batch, heads, length, pattern, dtype, rate, rescue) -> None:
    generator = torch.Generator().manual_seed(length)
    query, key, value, gradient = (
        torch.randn(batch, length, heads, 8, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for _ in range(4)
    )
    keep = torch.rand(batch, heads, length if pattern == "element" else 1, length, generator=generator) >= rate
    how = {"allowed": masks(kind, batch, length), "keep": keep, "rescue": rescue, "rate": rate}
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    expected = ops.dropped_attention(*wide, impl="reference", **how)
    found = ops.dropped_attention(query, key, value, impl="blocked", **how)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found[0].float(), expected[0], **tolerance)
    assert found[1:] == expected[1:]
    mine = torch.autograd.grad(found[0], (query, key, value), gradient)
    theirs = torch.autograd.grad(expected[0], wide, gradient.float())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, **tolerance)


def test_is_an_operator_that_compiles() -> None:
    query, key, value = (torch.randn(2, 70, 2, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    keep = torch.rand(2, 2, 1, 70, generator=torch.Generator().manual_seed(0)) > 0.4
    allowed = masks("left", 2, 70)
    torch.library.opcheck(blocked._attention, (query, key, value, allowed, keep, True, 0.3))
    compiled = torch.compile(blocked.attention, fullgraph=True, backend="aot_eager")
    arguments = (query, key, value, allowed, keep, "own", 0.3)
    assert torch.equal(compiled(*arguments)[0], blocked.attention(*arguments)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3"])
def test_a_model_in_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "block_rows", lambda queries: 4)
    model, batch = families.build(family), families.batch(family, side="left")
    results = []
    for impl in ("reference", "blocked"):
        twin = copy.deepcopy(model)
        handle = hk.attach(twin, hk.HiddenKeyConfig.preset("hiddenkey", rate=0.4), stock_dropout="off", impl=impl)
        with handle.step(3, [5, 6, 7]):
            loss = handle.loss(**batch)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, handle.realised()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)
    assert results[0][2] == results[1][2]


def test_long_masks_by_query_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    run = blocked.attention
    monkeypatch.setattr(blocked, "attention", lambda *a: called.append(a[0].shape[2]) or run(*a))
    for length in (api.BLOCKED_QUERIES - 1, api.BLOCKED_QUERIES):
        query = torch.randn(1, 1, length, 4)
        keep = torch.ones(1, 1, 1, length, dtype=torch.bool)
        how = {"allowed": reference.causal(length, length), "keep": keep, "rescue": "own", "rate": 0.1}
        ops.dropped_attention(query, query, query, **how)
    assert called == [api.BLOCKED_QUERIES]


def test_what_does_not_fit_is_refused() -> None:
    query = torch.randn(1, 2, 6, 8)
    keep = torch.ones(1, 2, 1, 6, dtype=torch.bool)
    how = {"keep": keep, "rescue": "own", "rate": 0.1, "impl": "blocked"}
    with pytest.raises(ConfigError, match="no attention sinks"):
        ops.dropped_attention(query, query, query, allowed=reference.causal(6, 6), sinks=torch.zeros(2), **how)
    with pytest.raises(ConfigError, match="takes a drawn mask"):
        ops.attention(query, query, query, allowed=None, kept=None, impl="blocked")
    with pytest.raises(ConfigError, match=r"disagree \(got .*\(1, 1, 5, 5\)"):
        blocked.attention(query, query, query, reference.causal(5, 5), keep, "own", 0.3)
    with pytest.raises(ConfigError, match=r"got torch\.float64 on cpu"):
        blocked.attention(*[query.double()] * 3, reference.causal(6, 6), keep, "own", 0.3)
