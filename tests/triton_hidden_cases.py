"""Cases of ``test_triton_hidden.py``: the kernel against ``ops.drop_hidden`` and the core's bits, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hiddenkey_rs import ConfigError, MaskKey, masks, ops
from hiddenkey_rs.ops import triton_hidden

KEY = MaskKey(seed=5, step=2, layer=1, site="ffn")
OTHER = MaskKey(seed=5, step=2, layer=1, site="ffn", branch=1)
KEYS = torch.tensor([KEY.derive()])
RATE = 0.3
THRESHOLD = masks.threshold(RATE)
SCALE = 1 / (1 - masks.realised(RATE))


def places(lengths: list[int], width: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Sample and position of every token of a padded batch, flat."""
    samples, positions = torch.full((len(lengths), width), -1), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        start = width - length if left else 0
        samples[row, start : start + length] = 7 + row + (row << 33)
        positions[row, start : start + length] = torch.arange(length)
    return samples.flatten(), positions.flatten()


def states(*shape: int, dtype=torch.float32, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("features", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_unfused_operations_bit_for_bit(dtype: torch.dtype, left: bool, features: int) -> None:
    samples, positions = places([17, 3, 1], 19, left=left)
    hidden, residual = states(3, 19, features, dtype=dtype), states(3, 19, features, dtype=dtype, seed=1)
    keep = ops.row_keep(KEYS[0], samples, positions, features, THRESHOLD).view(3, 19, features)
    plain = ops.drop_hidden(hidden, keep, SCALE)
    out, kept = triton_hidden.drop_elements(hidden, KEYS, samples, positions, THRESHOLD, SCALE, count=True)
    assert out.dtype == dtype
    assert torch.equal(out, plain)
    assert int(kept) == int(keep.sum())
    added, uncounted = triton_hidden.drop_elements(
        hidden, KEYS, samples, positions, THRESHOLD, SCALE, residual=residual
    )
    assert torch.equal(added, residual + plain)
    assert int(uncounted) == 0
    gradient = states(3, 19, features, dtype=dtype, seed=2).detach()
    ours = torch.autograd.grad(added, (hidden, residual), gradient)
    theirs = torch.autograd.grad(residual + plain, (hidden, residual), gradient)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bfloat16() -> None:
    # The interpreter cuts off where a GPU rounds: within one step of the unfused product, and zero where it is zero.
    samples, positions = places([17], 19, left=True)
    hidden = states(1, 19, 130, dtype=torch.bfloat16)
    keep = ops.row_keep(KEYS[0], samples, positions, 130, THRESHOLD).view(1, 19, 130)
    out, _ = triton_hidden.drop_elements(hidden, KEYS, samples, positions, THRESHOLD, SCALE)
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(out, ops.drop_hidden(hidden, keep, SCALE), rtol=2**-7, atol=0)


def test_the_cores_bits() -> None:
    expected = masks.element(KEY, [9], 33, 260, RATE).to_torch()[0, 0]
    ones = torch.ones(33, 260)
    out, _ = triton_hidden.drop_elements(ones, KEYS, torch.full((33,), 9), torch.arange(33), THRESHOLD, 1.0)
    assert torch.equal(out.bool(), expected)


def test_extreme_thresholds() -> None:
    samples, positions, ones = torch.full((16,), 3), torch.arange(16), torch.ones(16, 256)
    for threshold in (0, 1, 65535):
        keep = ops.row_keep(KEYS[0], samples, positions, 256, threshold)
        out, _ = triton_hidden.drop_elements(ones, KEYS, samples, positions, threshold, 1.0)
        assert torch.equal(out.bool(), keep)


@pytest.mark.parametrize("half", [0, 1])
def test_a_lane_equal_to_the_threshold_is_kept(half: int) -> None:
    lane = int(ops.philox(3, 0, 9, 0, KEY.derive())[0]) >> 16 * half & 0xFFFF
    for threshold in (lane, lane + 1):
        one = torch.ones(1, 128)
        out, _ = triton_hidden.drop_elements(one, KEYS, torch.tensor([9]), torch.tensor([3]), threshold, 1.0)
        assert bool(out[0, half]) == (threshold == lane)


def test_branches_share_the_rows_evenly() -> None:
    samples, positions = places([5, 4], 5, left=False)
    hidden = states(4, 5, 64).detach()
    keys = torch.tensor([KEY.derive(), OTHER.derive()])
    out, _ = triton_hidden.drop_elements(hidden, keys, samples.repeat(2), positions.repeat(2), THRESHOLD, SCALE)
    for part, key in enumerate(keys):
        rows = slice(2 * part, 2 * part + 2)
        alone, _ = triton_hidden.drop_elements(hidden[rows], key[None], samples, positions, THRESHOLD, SCALE)
        assert torch.equal(out[rows], alone)


def test_infinities_and_nans_are_dropped() -> None:
    samples, positions = torch.full((4,), 3), torch.arange(4)
    hidden = torch.full((4, 128), torch.nan)
    keep = ops.row_keep(KEYS[0], samples, positions, 128, THRESHOLD)
    out, _ = triton_hidden.drop_elements(hidden, KEYS, samples, positions, THRESHOLD, SCALE)
    assert torch.equal(out.isnan(), keep)
    assert not out[~keep].any()


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_whole_tokens(scale: float) -> None:
    keep = torch.tensor([True, False, True, False, False, True])
    hidden, residual = states(2, 3, 130), states(2, 3, 130, seed=1)
    plain = ops.drop_hidden(hidden, keep.view(2, 3, 1), scale)
    assert torch.equal(triton_hidden.drop_rows(hidden, keep, scale), plain)
    added = triton_hidden.drop_rows(hidden, keep, scale, residual=residual)
    assert torch.equal(added, residual + plain)
    ours = torch.autograd.grad(added.square().sum(), (hidden, residual))
    theirs = torch.autograd.grad((residual + plain).square().sum(), (hidden, residual))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_strided_states_and_gradients() -> None:
    samples, positions = places([3, 2], 3, left=False)
    hidden = states(3, 2, 64).transpose(0, 1)
    out, _ = triton_hidden.drop_elements(hidden, KEYS, samples, positions, THRESHOLD, SCALE)
    same, _ = triton_hidden.drop_elements(hidden.contiguous(), KEYS, samples, positions, THRESHOLD, SCALE)
    assert torch.equal(out, same)
    (gradient,) = torch.autograd.grad(out.sum(), hidden)
    assert torch.equal(gradient != 0, out != 0)


def test_as_torch_operators() -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    samples, positions = places([2, 1], 2, left=True)
    hidden, residual = states(2, 2, 20), states(2, 2, 20, seed=1)
    arguments = (hidden, residual, KEYS, samples, positions, THRESHOLD, SCALE, False)
    torch.library.opcheck(triton_hidden.drop_forward, arguments, test_utils=tests)
    torch.library.opcheck(triton_hidden.drop_rows_forward, (hidden, residual, samples >= 0, 1.5), test_utils=tests)


def test_nothing_to_do() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    out, kept = triton_hidden.drop_elements(torch.zeros(0, 8), KEYS, none, none, THRESHOLD, SCALE, count=True)
    assert out.shape == (0, 8)
    assert int(kept) == 0
    assert triton_hidden.drop_rows(torch.zeros(2, 0, 8), none.bool(), 1.0).shape == (2, 0, 8)


GOOD = {"hidden": torch.ones(2, 3, 8), "keys": KEYS, "samples": torch.zeros(6).long(), "positions": torch.arange(6)}
REFUSED = {
    "float16, bfloat16 and float32, not torch.float64": {"hidden": torch.ones(2, 3, 8).double()},
    "single number": {"hidden": torch.tensor(1.0)},
    "keys and places disagree": {"samples": torch.zeros(5).long()},
    r"shape \(branches, 2\)": {"keys": KEYS.repeat(4, 1)},
    "samples must be int64": {"samples": torch.zeros(6).int()},
    r"threshold must lie in 0\.\.65535 \(got 70000\)": {"threshold": 70000},
    "residual differs": {"residual": torch.ones(2, 3, 9)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_disagrees_is_refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        triton_hidden.drop_elements(**{"threshold": THRESHOLD, "scale": SCALE, **GOOD, **REFUSED[message]})


def test_flags_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="one bool a row"):
        triton_hidden.drop_rows(torch.ones(2, 3, 8), torch.ones(5).bool(), 1.0)
