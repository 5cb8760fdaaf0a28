"""Columns dropped under a plain causal mask: one call of torch's kernel gives what the definition gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenkey_rs import masks, ops
from hiddenkey_rs.ops import blocked, reference, triangle


def causal(lengths: list[tuple[int, int]], keys: int, silent: bool = False) -> torch.Tensor:
    """Allowed pairs of examples whose keys stand from one place up to another: bool (B, 1, K, K). ``silent``: queries of
    padding may attend to nothing."""
    place = torch.arange(keys)
    inside = torch.stack([(place >= begin) & (place < end) for begin, end in lengths])[:, None, None]
    allowed = reference.causal(keys, keys) & inside
    return allowed & inside.transpose(-1, -2) if silent else allowed


def find(allowed: torch.Tensor, keep: torch.Tensor, own: bool = True) -> triangle.Triangle | None:
    return triangle.find(masks.seen_keys(allowed.contiguous().numpy()), keep, own, len(allowed), keep.shape[1])


@settings(max_examples=40, deadline=None)
@given(
    keys=st.sampled_from([1, 2, 30, 65, 130]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    shared=st.booleans(),
    silent=st.booleans(),
    rate=st.sampled_from([0.0, 0.2, 0.8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_equals_the_definition(keys, batch, heads, shared, silent, rate, dtype, data) -> None:
    place = st.integers(0, keys)
    lengths = data.draw(st.lists(st.tuples(place, place), min_size=batch, max_size=batch))
    generator = torch.Generator().manual_seed(keys)
    query, key, value, gradient = (
        torch.randn(batch, keys, heads, 8, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for _ in range(4)
    )
    keep = torch.rand(1 if shared else batch, 1 if shared else heads, 1, keys, generator=generator) >= rate
    how = {
        "allowed": causal(lengths, keys, silent),
        "keep": keep.expand(batch, -1, -1, -1),
        "rescue": "own",
        "rate": rate,
    }
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    expected = ops.dropped_attention(*wide, impl="reference", **how)
    found = ops.dropped_attention(query, key, value, impl="blocked", **how)
    near = 2e-5 if dtype is torch.float32 else 4e-2
    torch.testing.assert_close(found[0].float(), expected[0], rtol=near, atol=near)
    assert found[1:] == expected[1:]
    mine = torch.autograd.grad(found[0], (query, key, value), gradient)
    theirs = torch.autograd.grad(expected[0], wide, gradient.float())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=near, atol=near)


def test_padding_longer_than_a_block_of_the_kernel() -> None:
    """The kernel goes through keys 512 at a time, here with nothing but padding in the first ones."""
    query, key, value = (torch.randn(1, 2, 700, 16, requires_grad=True) for _ in range(3))
    keep = torch.rand(1, 2, 1, 700) > 0.2
    how = {"allowed": causal([(600, 700)], 700), "keep": keep, "rescue": "own", "rate": 0.2}
    assert find(how["allowed"], keep) is not None
    results = []
    for impl in ("reference", "blocked"):
        out = ops.dropped_attention(query, key, value, impl=impl, **how)[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 40.0), (torch.float32, 200.0), (torch.bfloat16, 200.0)])
def test_queries_that_see_nothing_behind_keys_with_large_logits(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (torch.randn(1, 2, 40, 16, generator=generator).to(dtype) for _ in range(4))
    query, key, value = ((size * query).requires_grad_(), key.requires_grad_(), value.requires_grad_())
    allowed, keep = causal([(0, 25)], 40, silent=True), torch.rand(1, 2, 1, 40, generator=generator) > 0.2
    assert find(allowed, keep) is not None
    how = {"allowed": allowed, "keep": keep, "rescue": "own", "rate": 0.2, "impl": "blocked"}
    out, *_ = ops.dropped_attention(query, key, value, **how)
    found = torch.autograd.grad(out, (query, key, value), gradient)
    alone = [x[:, :, :25].detach().requires_grad_() for x in (query, key, value)]
    how |= {"allowed": causal([(0, 25)], 25), "keep": keep[..., :25]}
    expected = torch.autograd.grad(ops.dropped_attention(*alone, **how)[0], alone, gradient[:, :, :25])
    for mine, theirs in zip(found, expected, strict=True):
        assert not mine[:, :, 25:].any()
        torch.testing.assert_close(mine[:, :, :25], theirs, rtol=1e-2, atol=1e-2)


def test_which_masks_are_triangles() -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool).expand(2, 3, 1, 8)
    plain = reference.causal(8, 8)
    assert find(plain.expand(2, -1, -1, -1), keep) is not None
    assert find(causal([(2, 8), (0, 5)], 8), keep) is not None
    assert find(causal([(0, 0), (0, 8)], 8), keep) is not None  # an example that is all padding
    window = reference.sliding_window(8, 8, 3).expand(2, -1, -1, -1)
    everything = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    gap = plain.expand(2, -1, -1, -1).clone()
    gap[..., 3] = False
    for other in (window, everything, gap):
        assert find(other, keep) is None
    assert find(plain, keep[:1].expand(-1, -1, 8, -1)) is None  # a mask by query
    late = keep.clone()
    late[..., :2] = False
    assert find(plain.expand(2, -1, -1, -1), late) is not None
    assert find(plain.expand(2, -1, -1, -1), late, own=False) is None  # rescued by all that they may attend to
    assert find(plain.expand(2, -1, -1, -1), keep & False) is None  # heads that keep nothing at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_lie_as_the_operator_says(dtype: torch.dtype) -> None:
    """Compiled graphs go by the fake tensors' strides."""
    query, key, value = (torch.randn(2, 9, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    keep = torch.rand(2, 3, 1, 9) > 0.3
    keep[..., 0] = True
    arguments = (query, key, value, reference.causal(9, 9), keep, True, 0.3)
    assert find(arguments[3].expand(2, -1, -1, -1), keep) is not None
    torch.library.opcheck(blocked._attention, arguments)
    found = torch.autograd.grad(blocked._attention(*arguments)[0].sum(), (query, key, value))
    for mine, theirs in zip(found, (query, key, value), strict=True):
        assert mine.stride() == theirs.stride()


def test_queries_that_lie_otherwise_give_what_the_operator_says() -> None:
    """Phi and GLM concatenate halves of heads, which leaves heads outside."""
    query, key, value = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    keep = torch.rand(2, 3, 1, 9) > 0.3
    keep[..., 0] = True
    allowed = causal([(0, 9)], 9)
    assert find(allowed, keep) is not None
    torch.library.opcheck(blocked._attention, (query, key, value, allowed, keep, True, 0.3))
