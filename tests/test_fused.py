"""Dropout straight from the generator: the masks' own bits applied, forward and backward, as a torch operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hiddenkey_rs as hk
from hiddenkey_rs import ConfigError, DataError, ops

KEYS = [hk.MaskKey(seed=1, site="ffn", branch=branch) for branch in (0, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def batch(dtype: torch.dtype, features: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(features)
    hidden = torch.randn(4, 7, features, generator=generator).to(dtype).requires_grad_()
    samples = torch.randint(0, 1 << 40, (28,), generator=generator)
    samples[::9] = -1
    positions = torch.randint(0, 1000, (28,), generator=generator)
    return hidden, torch.tensor([key.derive() for key in KEYS]), samples, positions


def slow_keep(samples: torch.Tensor, positions: torch.Tensor, features: int, rate: float) -> torch.Tensor:
    """Row by row from the mask functions."""
    rows = []
    for number, (sample, position) in enumerate(zip(samples.tolist(), positions.tolist(), strict=True)):
        key = KEYS[number * len(KEYS) // len(samples)]
        row = np.zeros(features, bool)
        if sample >= 0:
            row = hk.masks.element_bool(key, [sample], position + 1, features, rate)[0, 0, -1]
        rows.append(torch.from_numpy(row))
    return torch.stack(rows)


@pytest.mark.parametrize("features", [1, 3, 127, 129, 2049])
@pytest.mark.parametrize("dtype", DTYPES)
def test_applies_the_masks_own_bits(dtype: torch.dtype, features: int) -> None:
    hidden, keys, samples, positions = batch(dtype, features)
    t = 9000
    keep = slow_keep(samples, positions, features, t / 65536).view(4, 7, features)
    out, kept = ops.drop_elements(hidden, keys, samples, positions, t, 1.25)
    expected = ops.drop_hidden(hidden, keep, 1.25)
    assert torch.equal(out, expected)
    assert int(kept) == int(keep.sum())
    gradient = torch.randn_like(out)
    assert torch.equal(*(torch.autograd.grad(o, hidden, gradient)[0] for o in (out, expected)))
    rows = samples >= 0
    dropped = ops.drop_rows(hidden, rows, 1.25)
    expected = ops.drop_hidden(hidden, rows.view(4, 7, 1), 1.25)
    assert torch.equal(dropped, expected)
    assert torch.equal(*(torch.autograd.grad(o, hidden, gradient)[0] for o in (dropped, expected)))


def test_large_results_and_strided_inputs() -> None:
    """Past 16 MiB results are stored around the cache."""
    hidden = torch.randn(4200, 1030).t().contiguous().t()
    samples, positions = torch.arange(4200), torch.zeros(4200, dtype=torch.int64)
    keys = torch.tensor([KEYS[0].derive()])
    out, _ = ops.drop_elements(hidden, keys, samples, positions, 6554, 1.1)
    keep = hk.masks.element_bool(KEYS[0], np.arange(4200), 1, 1030, 0.1)[:, 0, 0]
    assert torch.equal(out, ops.drop_hidden(hidden, torch.from_numpy(keep), 1.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (2, 0, 4), (0, 0)])
def test_nothing_to_drop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden = torch.zeros(shape, dtype=dtype, requires_grad=True)
    places = torch.zeros(hidden.shape[:-1].numel(), dtype=torch.int64)
    out, kept = ops.drop_elements(hidden, torch.tensor([KEYS[0].derive()]), places, places, 9000, 1.25)
    rows = ops.drop_rows(hidden, places == 0, 1.25)
    assert (out.shape, rows.shape, int(kept), out.dtype) == (shape, shape, 0, dtype)
    (out.sum() + rows.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == shape


def test_subnormal_numbers_are_flushed_everywhere_or_nowhere() -> None:
    """Helpers compute as the thread that they help: torch changes the setting of one thread alone."""
    hidden = torch.full((4096, 512), 1e-40)
    places = torch.arange(4096)
    arguments = (hidden, torch.tensor([KEYS[0].derive()]), places, places, 1, 1.0)
    threads = hk.get_num_threads()
    try:
        hk.set_num_threads(2)
        kept = int(ops.drop_elements(*arguments)[0].view(torch.int32).count_nonzero())
        assert torch.set_flush_denormal(True)
        flushed = ops.drop_elements(*arguments[:-1], 1.5)[0].view(torch.int32).count_nonzero(1)
    finally:
        torch.set_flush_denormal(False)
        hk.set_num_threads(threads)
    assert kept > 4096 * 500
    assert len(set((flushed > 0).tolist())) == 1


def test_is_an_operator_that_compiles() -> None:
    hidden, keys, samples, positions = batch(torch.float32, 37)
    torch.library.opcheck(ops.drop_elements, (hidden, keys, samples, positions, 9000, 1.25))
    torch.library.opcheck(ops.drop_rows, (hidden, samples >= 0, 1.25))

    def work(hidden: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        dropped = ops.drop_elements(hidden * 2, keys, samples, positions, 9000, 1.25)[0]
        return dropped.sin() + ops.drop_rows(hidden, samples >= 0, 1.1)

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    results = [f(hidden, keys) for f in (work, compiled)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(result.sum(), hidden)[0] for result in results))


def test_nothing_as_large_as_the_states_is_kept_for_backward() -> None:
    hidden, keys, samples, positions = batch(torch.float32, 300)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        ops.drop_elements(hidden, keys, samples, positions, 9000, 1.25)
        ops.drop_rows(hidden, samples >= 0, 1.25)
    assert max(kept) <= samples.numel()


def test_bad_input_is_refused() -> None:
    hidden, keys, samples, positions = (x.detach() for x in batch(torch.float32, 8))
    with pytest.raises(ConfigError, match=r"keys and places disagree \(got hidden \(4, 7, 8\)"):
        ops.drop_elements(hidden, keys, samples[1:], positions, 1, 1.0)
    with pytest.raises(ConfigError, match="disagree"):
        ops.drop_elements(hidden, keys[:, :1], samples, positions, 1, 1.0)
    with pytest.raises(DataError, match=r"sample must be at least 0 \(got -6\)"):
        ops.drop_elements(hidden, keys, samples - 5, positions, 1, 1.0)
    with pytest.raises(DataError, match=r"position must be at least 0 \(got -\d+\)"):
        ops.drop_elements(hidden, keys, samples.clamp(min=0), positions - positions.max() - 1, 1, 1.0)
    with pytest.raises(DataError, match="position must lie in"):
        ops.drop_elements(hidden, keys, samples.clamp(min=0), positions + (1 << 20), 1, 1.0)
    with pytest.raises(ConfigError, match="scale must be a finite number above 0"):
        ops.drop_elements(hidden, keys, samples, positions, 1, 0.0)
    for name, many in (("keys", [keys.int(), samples, positions]), ("positions", [keys, samples, positions.int()])):
        with pytest.raises(ConfigError, match=rf"{name} must be int64 \(got torch.int32\)"):
            ops.drop_elements(hidden, *many, 1, 1.0)
    for dtype in (torch.float16, torch.float64):  # which are drawn in torch
        other = hidden.to(dtype)
        with pytest.raises(DataError, match=r"sample ids must lie in .*\(got -6\)"):
            ops.drop_elements(other, keys, samples - 5, positions, 1, 1.0)
        for wrong in (positions + (1 << 20), positions - positions.max() - 1):
            with pytest.raises(DataError, match=r"positions must lie in \[0, 1048576\)"):
                ops.drop_elements(other, keys, samples.clamp(min=0), wrong, 1, 1.0)
        with pytest.raises(ConfigError, match="scale must be a finite number above 0"):
            ops.drop_elements(other, keys, samples, positions, 1, float("nan"))
        with pytest.raises(ConfigError, match=r"threshold must lie in 0..65536 \(got 65537\)"):
            ops.drop_elements(other, keys, samples, positions, 65537, 1.0)
    with pytest.raises(ConfigError, match="one bool a row"):
        ops.drop_rows(hidden, samples, 1.0)
