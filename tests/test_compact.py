"""Attention on gathered keys: equal to attention under a mask, forward and gradient, in every layout; and the choice."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
import hiddenkey_rs as hk
from hiddenkey_rs import ConfigError, ops
from hiddenkey_rs.ops import compact, reference

# Two orders of summation in float32; and 8 bits of mantissa.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def tensors(batch: int, heads: int, length: int, features: int, dtype: torch.dtype, inside: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    drawn = [torch.randn(batch, heads, length, features, generator=generator).to(dtype) for _ in range(4)]
    if inside:
        drawn = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in drawn]
    return [x.requires_grad_() for x in drawn]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.sampled_from([1, 3, 16, 33, 127, 129]),
    features=st.sampled_from([1, 8, 24]),
    dtype=st.sampled_from(list(TOLERANCE)),
    inside=st.booleans(),
    left=st.booleans(),
    rate=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    rescue=st.sampled_from(["own", "all"]),
)
def test_equals_attention_under_the_mask(batch, heads, length, features, dtype, inside, left, rate, rescue) -> None:
    query, key, value, gradient = tensors(batch, heads, length, features, dtype, inside)
    lengths = torch.arange(length, length - batch, -1).clamp(min=0)[:, None]
    column = torch.arange(length)
    real = column >= length - lengths if left else column < lengths
    allowed = real[:, None, None]
    keep = torch.rand(batch, heads, 1, length, generator=torch.Generator().manual_seed(batch)) >= rate
    keep[0, 0] = False
    how = {"allowed": allowed, "keep": keep, "rescue": rescue, "rate": rate, "scaling": 0.3}
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    expected = ops.dropped_attention(*wide, impl="reference", **how)
    found = ops.dropped_attention(query, key, value, impl="compact", **how)
    # What a query of padding gets is nobody's business.
    shown = real[:, None, :, None]
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found[0].float() * shown, expected[0] * shown, **tolerance)
    assert found[1:] == expected[1:]
    mine = torch.autograd.grad(found[0], (query, key, value), gradient * shown)
    theirs = torch.autograd.grad(expected[0], wide, gradient.float() * shown)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, **tolerance)


def test_grouped_heads_and_cross_attention() -> None:
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(2))
    for heads in (2, 4):
        keep = torch.rand(2, heads, 1, 9, generator=torch.Generator().manual_seed(heads)) > 0.5
        how = {"allowed": None, "keep": keep, "rescue": "all", "rate": 0.5}
        pair = [ops.dropped_attention(query, key, value, impl=impl, **how) for impl in ("reference", "compact")]
        torch.testing.assert_close(pair[0], pair[1], rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(out[0].sum(), (query, key, value)) for out in pair]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_an_example_without_a_real_key_gets_zeros() -> None:
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(2))
    allowed = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    allowed[1] = False
    for heads, rescue in ((2, "all"), (4, "all"), (2, "own")):
        keep = torch.ones(2, heads, 1, 9, dtype=torch.bool)
        keep[0, :, :, 2:5] = False
        how = {"allowed": allowed, "keep": keep, "rescue": rescue, "rate": 0.3}
        if rescue == "own":  # of self-attention
            query = torch.randn(2, 4, 9, 8, requires_grad=True)
        pair = [ops.dropped_attention(query, key, value, impl=impl, **how) for impl in ("reference", "compact")]
        torch.testing.assert_close(pair[0], pair[1], rtol=1e-5, atol=1e-6)
        assert not pair[1][0][1].any()
        gradients = [torch.autograd.grad(out[0].square().sum(), (query, key, value)) for out in pair]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["compact", "blocked"])
def test_queries_may_lie_in_memory_as_they_like(impl: str) -> None:
    """The kernel takes features to stand side by side, and reads past the end where they do not."""
    query, key, value = (torch.randn(2, 2, 8, 40).transpose(2, 3).requires_grad_() for _ in range(3))
    assert query.stride(-1) != 1
    keep = torch.rand(2, 2, 1, 40, generator=torch.Generator().manual_seed(0)) > 0.3
    how = {"allowed": None, "keep": keep, "rescue": "own", "rate": 0.3}
    pair = [ops.dropped_attention(query, key, value, impl=one, **how) for one in ("reference", impl)]
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-5, atol=1e-6)
    arriving = torch.randn(2, 2, 8, 40).transpose(2, 3)
    gradients = [torch.autograd.grad(out[0], (query, key, value), arriving) for out in pair]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_is_an_operator_that_compiles() -> None:
    query, key, value, _ = tensors(2, 2, 20, 8, torch.float32, True)
    real = torch.arange(20) < torch.tensor([[20], [13]])
    keep = (torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(0)) > 0.4) & real[:, None]
    torch.library.opcheck(compact._attention, (query, key, value, keep, real, 0.3))
    compiled = torch.compile(compact.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(query, key, value, keep, real, 0.3), compact.attention(query, key, value, keep, real, 0.3)
    )


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "roberta"])
def test_a_model_on_gathered_keys(family: str) -> None:
    model = families.build(family)
    batch = families.batch(family)
    results = []
    for impl in ("reference", "compact"):
        twin = copy.deepcopy(model)
        handle = hk.attach(twin, hk.HiddenKeyConfig.preset("hiddenkey", rate=0.4), stock_dropout="off", impl=impl)
        with handle.step(3, [5, 6, 7]):
            loss = handle.loss(**batch)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, handle.realised()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)
    assert results[0][2] == results[1][2]


def test_the_choice() -> None:
    assert not ops.worth_gathering(128, 128, 0.1)
    assert not ops.worth_gathering(4096, 4096, 0.0)
    assert ops.worth_gathering(4096, 4096, 0.1)
    assert not ops.worth_gathering(512, 512, 0.1), "measured: a boolean row is faster there"
    assert ops.worth_gathering(512, 512, 0.2)
    assert ops.worth_gathering(512, 512, 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"allowed": reference.causal(6, 6)}, "queries of a head see different keys"),
        ({"keep": torch.ones(1, 2, 6, 6, dtype=torch.bool)}, "queries of a head see different keys"),
        ({"dropout": 0.1}, "attention dropout draws on weights"),
        ({"value": torch.randn(1, 2, 6, 4)}, "values are 4 wide, queries and keys 8"),
        ({"scaling": -0.5}, "logits are scaled by -0.5, which is not positive"),
        ({"position": "dropattention"}, "before softmax only"),
        ({"sinks": torch.zeros(2)}, "no attention sinks"),
        ({"impl": "fast"}, "unknown impl"),
    ],
)
def test_an_explicit_choice_never_falls_back(change: dict, message: str) -> None:
    query = torch.randn(1, 2, 6, 8)
    how = {"allowed": None, "keep": torch.ones(1, 2, 1, 6, dtype=torch.bool), "rescue": "own", "rate": 0.1}
    with pytest.raises(ConfigError, match=message):
        ops.dropped_attention(query, query, **{"value": query, **how, "impl": "compact", **change})


@pytest.mark.parametrize("odd", [{"width": 4}, {"scaling": -0.3}, {"scaling": 0.0}])
@pytest.mark.parametrize("long", [True, False])
def test_auto_goes_round_what_the_kernel_cannot_do(odd: dict, long: bool) -> None:
    """DeepSeek's values are narrower than its keys."""
    length = max(ops.api.BLOCKED_QUERIES, 512)
    query = torch.randn(1, 2, length, 8, requires_grad=True)
    value = torch.randn(1, 2, length, odd.get("width", 8), requires_grad=True)
    allowed = reference.causal(length, length) if long else None
    keep = torch.rand(1, 2, 1, length, generator=torch.Generator().manual_seed(0)) > 0.3
    how = {"allowed": allowed, "keep": keep, "rescue": "own", "rate": 0.3, "scaling": odd.get("scaling")}
    pair = [ops.dropped_attention(query, query, value, impl=impl, **how) for impl in ("reference", "auto")]
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out[0].square().sum(), (query, value)) for out in pair]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
    if long:  # what drops nothing
        kept = {"allowed": allowed, "kept": allowed, "scaling": odd.get("scaling")}
        pair = [ops.attention(query, query, value, impl=impl, **kept) for impl in ("reference", "auto")]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_a_tiny_denominator_without_spare_places() -> None:
    """exp(-log-sum) is infinite there, and no spare places of it are none."""
    q = torch.ones(1, 2, 32, 8)
    k = torch.stack([torch.full((32, 8), -100.0), torch.zeros(32, 8)])[None]
    keep = torch.ones(1, 2, 1, 32, dtype=torch.bool)
    keep[0, 1, 0, :5] = False
    v = torch.randn(1, 2, 32, 8)
    found = [
        ops.dropped_attention(q, k, v, allowed=None, keep=keep, rescue="own", rate=0.1, impl=impl)[0]
        for impl in ("compact", "reference")
    ]
    torch.testing.assert_close(*found)


def test_shapes_that_disagree_are_refused() -> None:
    query = torch.randn(1, 2, 6, 8)
    keep, real = torch.ones(1, 2, 6, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"disagree \(got .*\(1, 2, 5\)"):
        compact.attention(query, query, query, keep[..., :5], real, 0.3)
    with pytest.raises(ConfigError, match=r"got torch\.float64 on cpu"):
        compact.attention(*[query.double()] * 3, keep, real, 0.3)
    with pytest.raises(ConfigError, match=r"different types or devices \(got .*torch\.bfloat16 on cpu\)"):
        compact.attention(query, query, query.bfloat16(), keep, real, 0.3)


@pytest.mark.parametrize("rescue", ["own", "all"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("padded", [True, False])
def test_a_row_for_all_queries_where_nobody_can_be_asked(
    rescue: str, heads: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In graphs and on accelerators: no kept set of (query, key) pairs is made."""
    query, value = torch.randn(3, 4, 9, 8, requires_grad=True), torch.randn(3, 2, 9, 6, requires_grad=True)
    key = torch.randn(3, 2, 9, 8, requires_grad=True)
    allowed = (torch.arange(9) < torch.tensor([9, 4, 0])[:, None])[:, None, None] if padded else None
    keep = torch.rand(3, heads, 1, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    keep[:, 0] = False
    how = {"allowed": allowed, "keep": keep, "rescue": rescue, "rate": 0.4}
    expected = ops.dropped_attention(query, key, value, impl="reference", **how)
    monkeypatch.setattr(reference, "kept_set", None)
    compiled = torch.compile(ops.dropped_attention, fullgraph=True, backend="aot_eager")
    found = compiled(query, key, value, impl="auto", **how)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(out[0].square().sum(), (query, key, value)) for out in (expected, found)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
