"""Attention against a row-by-row float64 implementation, its gradients against closed forms, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hiddenkey_rs import ConfigError, ops
from hiddenkey_rs.ops import reference, sdpa
from reference import attention as slow


def inputs(batch=2, heads=4, groups=2, queries=7, keys=7, size=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, size, generator=generator, dtype=dtype)
    k = torch.randn(batch, groups, keys, size, generator=generator, dtype=dtype)
    v = torch.randn(batch, groups, keys, size + 1, generator=generator, dtype=dtype)
    return q, k, v, generator


def allowed_pairs(kind: str, batch: int, queries: int, keys: int) -> torch.Tensor | None:
    if kind == "all":
        return None
    if kind == "causal":
        return ops.causal(queries, keys)
    if kind == "window":
        return ops.sliding_window(queries, keys, 3)
    lengths = torch.arange(keys, keys - batch, -1)[:, None, None, None]
    column = torch.arange(keys)
    if kind == "right padding":
        return column < lengths
    return (column >= keys - lengths) & ops.causal(queries, keys)  # left padding: rows without any key


ALLOWED = ["all", "causal", "window", "right padding", "left padding"]


def keep_mask(pattern: str, generator, batch, heads, queries, keys, rate=0.6) -> torch.Tensor:
    rows = queries if pattern == "element" else 1
    if pattern == "span":
        start = torch.randint(0, keys - 3, (batch, heads, 1, 1), generator=generator)
        column = torch.arange(keys)
        return (column < start) | (column >= start + 4)
    return torch.rand(batch, heads, rows, keys, generator=generator) >= rate


@pytest.mark.parametrize("position", ["dropkey", "dropattention"])
@pytest.mark.parametrize("pattern", ["element", "column", "span"])
@pytest.mark.parametrize("kind", ALLOWED)
@pytest.mark.parametrize("extras", ["plain", "bias", "softcap", "sinks", "scale", "everything"])
def test_equals_the_row_by_row_definition(position: str, pattern: str, kind: str, extras: str) -> None:
    q, k, v, generator = inputs()
    allowed = allowed_pairs(kind, 2, 7, 7)
    keep = keep_mask(pattern, generator, 2, 4, 7, 7)
    how = {
        "bias": torch.randn(2, 4, 7, 7, generator=generator, dtype=q.dtype)
        if extras in ("bias", "everything")
        else None,
        "softcap": 1.5 if extras in ("softcap", "everything") else None,
        "sinks": torch.randn(4, generator=generator, dtype=q.dtype) if extras in ("sinks", "everything") else None,
        "scaling": 0.3 if extras in ("scale", "everything") else None,
    }
    kept = ops.kept_set(allowed, keep, rescue="own", queries=7, keys=7)
    output = ops.attention(q, k, v, allowed=allowed, kept=kept, position=position, impl="reference", **how)
    full = (2, 4, 7, 7)
    pairs = torch.ones(full, dtype=torch.bool) if allowed is None else allowed.expand(full)
    numbers = {name: None if value is None else np.asarray(value) for name, value in how.items() if name != "scaling"}
    expected = slow.attention(
        *(x.numpy() for x in (q, k, v, pairs, keep.expand(full))),
        rescue="own",
        position=position,
        scaling=how["scaling"] or 5**-0.5,
        **numbers,
    )
    # both in float64: only the order of sums differs
    torch.testing.assert_close(output, torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("position", ["dropkey", "dropattention"])
def test_cross_attention_is_rescued_by_all_allowed_keys(position: str) -> None:
    q, k, v, _ = inputs(queries=3, keys=5)
    allowed = torch.tensor([True, True, False, True, False]).expand(2, 1, 1, 5)
    keep = torch.zeros(2, 4, 1, 5, dtype=torch.bool)
    kept = ops.kept_set(allowed, keep, rescue="all", queries=3, keys=5)
    assert torch.equal(kept.expand(2, 4, 3, 5), allowed.expand(2, 4, 3, 5))
    output = ops.attention(q, k, v, allowed=allowed, kept=kept, position=position)
    plain = ops.attention(q, k, v, allowed=allowed, kept=allowed, position="dropkey", impl="reference")
    torch.testing.assert_close(output, plain)


def test_the_kept_set_never_widens_and_rescues_by_rule() -> None:
    allowed = ops.causal(4, 4).clone()
    allowed[..., 3, :] = False
    allowed[..., 2, 2] = False  # row 2 may not attend to itself
    keep = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    kept = ops.kept_set(allowed, keep, rescue="own", queries=4, keys=4)[0, 0].int().tolist()
    assert kept == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("size", [1, 3, 127, 129])
def test_sdpa_equals_the_reference(size: int) -> None:
    q, k, v, generator = inputs(queries=size, keys=size, dtype=torch.float32)
    for kind in ALLOWED[:4] if size > 1 else ["all", "causal"]:
        allowed = allowed_pairs(kind, 2, size, size)
        kept = ops.kept_set(
            allowed, keep_mask("column", generator, 2, 4, size, size), rescue="own", queries=size, keys=size
        )
        both = [
            ops.attention(q, k, v, allowed=allowed, kept=kept, impl=impl, scaling=0.4) for impl in ("sdpa", "reference")
        ]
        # float32 softmax over at most 129 keys
        torch.testing.assert_close(both[0], both[1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*ALLOWED, "nothing dropped"])
def test_short_rows_in_16_bits_equal_the_reference(dtype: torch.dtype, kind: str) -> None:
    """They take plain products instead of torch's kernel; the left padding has rows without any key."""
    q, k, v, generator = inputs(queries=9, keys=9, dtype=torch.float32)
    allowed, kept = None, None
    if kind != "nothing dropped":
        allowed = allowed_pairs(kind, 2, 9, 9)
        kept = ops.kept_set(allowed, keep_mask("column", generator, 2, 4, 9, 9), rescue="own", queries=9, keys=9)
    results = []
    for impl, to in (("sdpa", dtype), ("reference", torch.float32)):
        leaves = [x.to(dtype).to(to).requires_grad_() for x in (q, k, v)]
        output = ops.attention(*leaves, allowed=allowed, kept=kept, impl=impl)
        results.append((output, *torch.autograd.grad(output.float().sin().sum(), leaves)))
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        # a bfloat16 has 8 significant bits, and a gradient is a sum of products of several rounded numbers
        torch.testing.assert_close(ours.float(), exact, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 0.01)


def test_long_rows_and_float32_take_the_kernel() -> None:
    q = torch.randn(1, 1, sdpa.SHORT, 4, dtype=torch.bfloat16)
    assert sdpa.is_short(q, q)
    assert not sdpa.is_short(q.float(), q.float())
    assert not sdpa.is_short(q, torch.cat((q, q), dim=2))


# -- gradients, method section 2 ----------------------------------------------------------------------------------


def weights_and_jacobian(position: str, logits: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Final weights w' of one row and dw'_u / dg_v."""
    key = torch.eye(len(logits), dtype=torch.float64)[None, None]

    def final(g: torch.Tensor) -> torch.Tensor:
        w = ops.attention_weights(
            g[None, None, None], key, allowed=None, kept=kept[None, None, None], position=position, scaling=1.0
        )
        return w[0, 0, 0]

    return final(logits), torch.autograd.functional.jacobian(final, logits)


def test_gradients_have_their_closed_forms() -> None:
    logits = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.5], dtype=torch.float64)
    kept = torch.tensor([True, False, True, False, True])
    w = logits.softmax(0)
    s = w[kept].sum()
    expected = torch.where(kept, w / s, 0.0)
    for position in ("dropkey", "dropattention"):
        final, jacobian = weights_and_jacobian(position, logits, kept)
        torch.testing.assert_close(final, expected)
        eye = torch.eye(5, dtype=torch.float64)
        inner = final[None, :] if position == "dropkey" else w[None, :]
        closed = final[:, None] * (eye - inner)
        if position == "dropkey":
            closed[:, ~kept] = 0
        torch.testing.assert_close(jacobian, closed)
        if position == "dropattention":  # a dropped key m still gets -w'_u w_m
            torch.testing.assert_close(jacobian[0, 1], -final[0] * w[1])
            ratio = (1 - expected[kept]) / (1 - w[kept])
            key_diagonal = weights_and_jacobian("dropkey", logits, kept)[1].diagonal()[kept]
            torch.testing.assert_close(key_diagonal / jacobian.diagonal()[kept], ratio)
            assert (ratio < 1).all()


def test_dropattention_with_a_live_denominator_is_dropkey() -> None:
    q, k, v, generator = inputs()
    q.requires_grad_()
    kept = ops.kept_set(None, keep_mask("column", generator, 2, 4, 7, 7), rescue="own", queries=7, keys=7)
    w = ops.attention_weights(q, k, allowed=None, kept=None)
    live = torch.where(kept, w, 0.0)
    live = live / live.sum(-1, keepdim=True) @ v.repeat_interleave(2, dim=1)
    dropkey = ops.attention(q, k, v, allowed=None, kept=kept, impl="reference")
    torch.testing.assert_close(live, dropkey)
    grads = [torch.autograd.grad(x.sin().sum(), q, retain_graph=True)[0] for x in (live, dropkey)]
    torch.testing.assert_close(*grads)
    detached = ops.attention(q, k, v, allowed=None, kept=kept, position="dropattention")
    torch.testing.assert_close(detached, dropkey)
    assert (torch.autograd.grad(detached.sin().sum(), q)[0] - grads[1]).abs().max() > 1e-3


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("kind", ALLOWED)
def test_dropkey_gradcheck(impl: str, kind: str) -> None:
    q, k, v, generator = inputs(batch=2, heads=2, groups=1, queries=4, keys=4, size=3)
    allowed = allowed_pairs(kind, 2, 4, 4)
    kept = ops.kept_set(allowed, keep_mask("element", generator, 2, 2, 4, 4), rescue="own", queries=4, keys=4)
    for x in (q, k, v):
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, allowed=allowed, kept=kept, impl=impl), (q, k, v))


def test_dropkey_gradcheck_with_bias_softcap_and_sinks() -> None:
    q, k, v, generator = inputs(batch=1, heads=2, groups=1, queries=3, keys=3, size=2)
    bias = torch.randn(1, 2, 3, 3, generator=generator, dtype=q.dtype)
    sinks = torch.randn(2, generator=generator, dtype=q.dtype)
    kept = ops.kept_set(ops.causal(3, 3), keep_mask("column", generator, 1, 2, 3, 3), rescue="own", queries=3, keys=3)
    for x in (q, k, v, bias, sinks):
        x.requires_grad_()

    def run(q, k, v, bias, sinks):
        return ops.attention(q, k, v, allowed=ops.causal(3, 3), kept=kept, bias=bias, softcap=2.0, sinks=sinks)

    assert torch.autograd.gradcheck(run, (q, k, v, bias, sinks))


@pytest.mark.parametrize("position", ["dropkey", "dropattention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("kind", ALLOWED)
def test_no_nan_ever(position: str, dtype: torch.dtype, rate: float, kind: str) -> None:
    q, k, v, generator = inputs(dtype=torch.float32)
    # logits so large that most weights underflow, gradients still within float16's range
    q, k, v = (x.to(dtype).requires_grad_() for x in (100 * q, k, v))
    allowed = allowed_pairs(kind, 2, 7, 7)
    kept = ops.kept_set(allowed, keep_mask("column", generator, 2, 4, 7, 7, rate), rescue="own", queries=7, keys=7)
    output = ops.attention(q, k, v, allowed=allowed, kept=kept, position=position)
    output.float().sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_rows_without_keys_are_zero_and_pass_no_gradient() -> None:
    q, k, v, generator = inputs()
    q.requires_grad_()
    allowed = allowed_pairs("left padding", 2, 7, 7)
    kept = ops.kept_set(allowed, keep_mask("column", generator, 2, 4, 7, 7), rescue="own", queries=7, keys=7)
    for position, impl in (("dropkey", "sdpa"), ("dropkey", "reference"), ("dropattention", "reference")):
        output = ops.attention(q, k, v, allowed=allowed, kept=kept, position=position, impl=impl)
        (grad,) = torch.autograd.grad(output.sum(), q)
        assert (output[1, :, 0] == 0).all()
        assert (grad[1, :, 0] == 0).all()


@pytest.mark.parametrize("position", ["dropkey", "dropattention"])
def test_the_future_never_leaks(position: str) -> None:
    """Row 0 loses its only key with the rate's probability; a changed future token must change nothing before it."""
    q, k, v, _ = inputs()
    keep = torch.zeros(2, 4, 1, 7, dtype=torch.bool)
    kept = ops.kept_set(ops.causal(7, 7), keep, rescue="own", queries=7, keys=7)
    outputs = []
    for future in (0.0, 1e6):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 4:], v2[:, :, 4:] = future, future
        outputs.append(ops.attention(q, k2, v2, allowed=ops.causal(7, 7), kept=kept, position=position)[:, :, :4])
    assert torch.equal(outputs[0], outputs[1])


def test_masks_of_a_users_own_may_differ_by_head() -> None:
    size = ops.api.BLOCKED_QUERIES
    q = torch.randn(1, 2, size, 8)
    allowed = torch.stack([reference.causal(size, size)[0, 0], torch.ones(size, size, dtype=torch.bool)])[None]
    drawn = {"allowed": allowed, "keep": torch.rand(1, 2, 1, size) > 0.2, "rescue": "own", "rate": 0.2}
    found = [ops.dropped_attention(q, q, q, **drawn, impl=impl)[0] for impl in ("auto", "reference")]
    torch.testing.assert_close(*found)
    with pytest.raises(ConfigError, match="heads are allowed different keys"):
        ops.dropped_attention(q, q, q, **drawn, impl="blocked")


def test_an_explicit_choice_never_falls_back() -> None:
    q, k, v, _ = inputs()
    sinks = torch.zeros(4)
    for how, reason in (
        ({"position": "dropattention"}, "before softmax"),
        ({"softcap": 5.0}, "soft-capping"),
        ({"sinks": sinks}, "sinks"),
        ({"bias": torch.zeros(1, 4, 7, 7)}, "bias"),
    ):
        with pytest.raises(ConfigError, match=rf"{reason}.*got impl='sdpa'"):
            ops.attention(q, k, v, allowed=None, kept=None, impl="sdpa", **how)
    with pytest.raises(ConfigError, match="unknown impl"):
        ops.attention(q, k, v, allowed=None, kept=None, impl="fast")
    with pytest.raises(ConfigError, match="unknown attention position"):
        ops.attention(q, k, v, allowed=None, kept=None, position="hiddencut")


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_without_a_kept_set_what_is_allowed_is_kept(impl: str) -> None:
    query, key, value = (torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    allowed = ops.causal(5, 5)
    expected = ops.attention(query, key, value, allowed=allowed, kept=allowed, impl="reference")
    torch.testing.assert_close(ops.attention(query, key, value, allowed=allowed, kept=None, impl=impl), expected)


@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa", "blocked", "compact"])
@pytest.mark.parametrize(("batch", "queries"), [(0, 256), (2, 0), (0, 0)])
def test_nothing_to_attend_for_gives_nothing_and_zero_gradients(impl: str, batch: int, queries: int) -> None:
    query = torch.randn(batch, 2, queries, 8, requires_grad=True)
    key, value = (torch.full((batch, 2, 256, 8), 3.0, requires_grad=True) for _ in range(2))
    keep = torch.arange(256) % 3 > 0
    allowed = None if impl == "compact" or queries == 0 else ops.causal(queries, 256)
    how = {"rescue": "all" if queries == 0 else "own", "rate": 0.1, "impl": impl}
    out, dropped, _ = ops.dropped_attention(
        query, key, value, allowed=allowed, keep=keep.expand(batch, 2, 1, 256), **how
    )
    out.sum().backward()
    assert out.shape == query.shape
    assert int(dropped) == 0
    for tensor in (key, value):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_a_query_without_a_key_of_its_own_is_not_gathered() -> None:
    query = torch.randn(1, 2, 600, 64)
    key, value = torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64)
    keep = torch.rand(1, 2, 1, 512) > 0.3
    keep[0, 0] = False
    how = {"allowed": None, "keep": keep, "rescue": "own", "rate": 0.3}
    expected = ops.dropped_attention(query, key, value, impl="reference", **how)
    found = ops.dropped_attention(query, key, value, **how)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert found[1:] == expected[1:]
    with pytest.raises(ConfigError, match="rescue='own' asks for as many queries as keys, not 600 and 512"):
        ops.dropped_attention(query, key, value, impl="compact", **how)
