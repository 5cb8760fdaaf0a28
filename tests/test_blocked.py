"""Attention a block of queries at a time: equal to attention under the whole mask, forward, gradient and counts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
import hiddenkey_rs as hk
from hiddenkey_rs import ConfigError, ops
from hiddenkey_rs import masks as core
from hiddenkey_rs.ops import api, blocked, cpu_kernel, reference

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


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["causal", "window", "packed", "left", "right", "any"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20)),
    alone=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rate=st.sampled_from([0.0, 0.4, 1.0]),
    own=st.booleans(),
    cut=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_the_mask_of_a_block_is_the_kept_set(kind, shape, alone, dtype, rate, own, cut) -> None:
    batch, heads, length = shape
    generator = torch.Generator().manual_seed(length)
    allowed = torch.rand(batch, 1, length, length, generator=generator) < 0.5 if kind == "any" else None
    allowed = (masks(kind, batch, length) if allowed is None else allowed).expand(batch, -1, -1, -1)
    allowed = allowed[: 1 if alone[0] else batch].contiguous()
    drawn = [1 if alone[1] else batch, heads, 1 if alone[2] else length, length]
    keep = torch.rand(drawn, generator=generator) >= rate
    start, stop = sorted(min(row, length) for row in cut)
    seen = core.seen_keys(allowed.numpy())
    assert (seen[..., 2] == allowed[:, 0].sum(dim=-1).numpy()).all()
    there = torch.from_numpy(seen[:, start:stop].astype(np.int64))
    columns = (int(there[..., 0].min()), int(there[..., 1].max())) if there[..., 2].any() else (0, 0)
    size = (max(len(allowed), len(keep)), heads, stop - start)
    out = torch.full((*size, columns[1] - columns[0]), 7.0, dtype=dtype)
    empty = torch.full(size, fill_value=True)
    forbidden = int(cpu_kernel.bits(torch.tensor([-torch.inf], dtype=dtype))[0])
    flat = (cpu_kernel.bits(out.flatten()), empty.flatten().numpy())
    kept, without = core.block_mask(allowed.numpy(), seen, keep.numpy(), own, (start, stop), columns, forbidden, *flat)
    rescue = "own" if own else "all"
    expected = reference.kept_set(allowed, keep, rescue=rescue, queries=length, keys=length)
    expected = expected.expand(-1, -1, length, -1)[:, :, start:stop]
    none = ~expected.any(dim=-1)
    assert int(expected.count_nonzero()) == kept
    assert int(none.count_nonzero()) == without
    assert torch.equal(torch.from_numpy(flat[1]).view(size), none)
    found = torch.from_numpy(flat[0].astype(np.int64)).view(out.shape)
    zero = (expected | none[..., None])[..., slice(*columns)]
    assert torch.equal(found == 0, zero)
    assert bool((found[~zero] == forbidden).all())


@pytest.mark.parametrize("room", [1, 20_000, 1 << 30])
def test_examples_share_the_room_for_masks(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "MASK_BYTES", room)
    query, key, value, gradient = (torch.randn(5, 2, 70, 8, requires_grad=True) for _ in range(4))
    keep = torch.rand(5, 2, 1, 70, generator=torch.Generator().manual_seed(0)) > 0.4
    how = {"allowed": masks("left", 5, 70), "keep": keep, "rescue": "own", "rate": 0.4}
    results = []
    for impl in ("reference", "blocked"):
        out, *counts = ops.dropped_attention(query, key, value, impl=impl, **how)
        results.append((out, counts, torch.autograd.grad(out, (query, key, value), gradient)))
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["causal", "window", "left"])
@pytest.mark.parametrize("heads", [1, 2])
def test_what_drops_nothing_is_taken_in_blocks_too(kind: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    run = blocked.attention
    monkeypatch.setattr(blocked, "attention", lambda *a: called.append(1) or run(*a))
    length = api.BLOCKED_QUERIES
    query = torch.randn(2, 2, length, 8, requires_grad=True)
    key, value = (torch.randn(2, heads, length, 8, requires_grad=True) for _ in range(2))
    allowed, gradient = masks(kind, 2, length), torch.randn(2, 2, length, 8)
    results = []
    for impl in ("reference", "auto"):
        out = ops.attention(query, key, value, allowed=allowed, kept=allowed, scaling=0.3, impl=impl)
        results.append((out, torch.autograd.grad(out, (query, key, value), gradient)))
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-5)
    assert called == [1]
    short = query[:, :, 1:]
    ops.attention(short, key, value, allowed=allowed[:, :, 1:], kept=allowed[:, :, 1:])
    ops.attention(query, key, value, allowed=allowed[:, :, -1:], kept=allowed[:, :, -1:])
    ops.attention(query, key, value, allowed=allowed, kept=allowed, dropout=0.5)
    ops.attention(query, key, value, allowed=allowed, kept=allowed, impl="sdpa")
    assert called == [1]


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
    with pytest.raises(ConfigError, match=r"different types or devices \(got torch\.float32 on cpu, torch\.bfloat16"):
        blocked.attention(query, query.bfloat16(), query, reference.causal(6, 6), keep, "own", 0.3)
