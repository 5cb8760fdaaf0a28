"""Dropout applied to hidden states straight from the generator, as torch operators: no mask is stored, forward or backward.

The backward pass applies the same operator to the gradient; what it keeps are the ids and places of the tokens, which
all layers share. On a CPU, float32 and bfloat16 go through the Rust core; everything else draws its bits in torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..config import RATE_LEVELS
from ..errors import ConfigError, DataError
from .generator import row_keep
from .hidden import drop_hidden

# numpy has no bfloat16: the core takes its bits.
_CORE_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}


@torch.library.custom_op("hiddenkey_rs::drop_elements", mutates_args=())
def drop_elements(
    hidden: Tensor, keys: Tensor, samples: Tensor, positions: Tensor, threshold: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Element pattern: ``out = keep ? hidden * scale : 0``, the product in float32, rounded to the dtype (paper, eq. 8).

    Args:
        hidden: (..., D), any float dtype; N rows in all.
        keys: int64 (branches, 2), site keys (:meth:`~hiddenkey_rs.MaskKey.derive`) of as many equal parts of the rows.
        samples: int64 (N,), each row's example in [0, 2**40), or -1 for padding, which becomes zero.
        positions: int64 (N,), each row's place in its example, in [0, 2**20).
        threshold: of the rate, 0..65536. scale: 1 / (1 - realised rate) for inverted dropout, 1 for none.

    Returns:
        (out, kept): like ``hidden``; int64 (), how many places were kept, padding not counted.

    Raises:
        ConfigError: shapes that disagree. DataError: ids or places out of range (on a CPU).

    Example:
        >>> import hiddenkey_rs as hk
        >>> keys = torch.tensor([hk.MaskKey(seed=1, site="ffn").derive()])
        >>> out, kept = drop_elements(torch.ones(3, 8), keys, torch.tensor([7, 7, -1]), torch.tensor([0, 1, 0]), 32768, 2.0)
        >>> int(kept) == int((out != 0).sum()), out[2].tolist() == [0.0] * 8
        (True, True)
    """
    branches = _check(hidden, keys, samples, positions)
    _check_numbers(threshold, scale)
    if not hidden.numel():
        return torch.empty_like(hidden, memory_format=torch.contiguous_format), samples.new_zeros(())
    core = _CORE_DTYPES.get(hidden.dtype) if hidden.device.type == "cpu" else None
    if core is None:
        if hidden.device.type == "cpu":
            _check_places(samples, positions)
        rows = hidden.reshape(-1, hidden.shape[-1]).chunk(branches)
        places = zip(keys, rows, samples.chunk(branches), positions.chunk(branches), strict=True)
        drawn = [_drop_in_torch(key, part, ids, place, threshold, scale) for key, part, ids, place in places]
        return torch.cat([out for out, _ in drawn]).view(hidden.shape), torch.stack([kept for _, kept in drawn]).sum()
    source = hidden.contiguous()
    out = torch.empty_like(source)
    many = samples.numel() // branches
    kept = 0
    ids, places_in = (part.contiguous().numpy() for part in (samples, positions))
    before, after = (tensor.view(core).view(-1, hidden.shape[-1]).numpy() for tensor in (source, out))
    for branch, (k0, k1) in enumerate(keys.tolist()):
        part = slice(branch * many, (branch + 1) * many)
        where = (ids[part], places_in[part])
        kept += masks.drop_elements((k0, k1), where[0], where[1], threshold, scale, before[part], after[part])
    return out, torch.tensor(kept)


@drop_elements.register_fake
def _(
    hidden: Tensor, keys: Tensor, samples: Tensor, positions: Tensor, threshold: int, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), samples.new_empty(())


def _keep_coordinates(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, keys, samples, positions, ctx.threshold, ctx.scale = inputs
    ctx.save_for_backward(keys, samples, positions)
    ctx.mark_non_differentiable(output[1])


def _drop_gradient(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    return drop_elements(gradient, *ctx.saved_tensors, ctx.threshold, ctx.scale)[0], None, None, None, None, None


drop_elements.register_autograd(_drop_gradient, setup_context=_keep_coordinates)


@torch.library.custom_op("hiddenkey_rs::drop_rows", mutates_args=())
def drop_rows(hidden: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Column and span patterns: whole rows go, ``out = keep ? hidden * scale : 0``.

    Args:
        hidden: (..., D), any float dtype; N rows in all. keep: bool (N,), one flag a row. scale: of the rows that stay.

    Raises:
        ConfigError: shapes or dtypes that disagree.

    Example:
        >>> drop_rows(torch.ones(2, 3), torch.tensor([True, False]), 1.5)
        tensor([[1.5000, 1.5000, 1.5000],
                [0.0000, 0.0000, 0.0000]])
    """
    rows = hidden.shape[:-1].numel()
    if keep.shape != (rows,) or keep.dtype != torch.bool:
        raise ConfigError(
            f"keep must hold one bool a row of hidden states (got {keep.dtype} of shape {tuple(keep.shape)} for "
            f"{rows} rows); flatten batch and length alike"
        )
    if not hidden.numel():
        return torch.empty_like(hidden, memory_format=torch.contiguous_format)
    core = _CORE_DTYPES.get(hidden.dtype) if hidden.device.type == "cpu" else None
    if core is None:
        return drop_hidden(hidden, keep.view(*hidden.shape[:-1], 1), scale).contiguous()
    source = hidden.contiguous()
    out = torch.empty_like(source)
    views = [tensor.view(core).view(-1, hidden.shape[-1]).numpy() for tensor in (source, out)]
    masks.drop_rows(keep.contiguous().numpy(), scale, *views)
    return out


@drop_rows.register_fake
def _(hidden: Tensor, keep: Tensor, scale: float) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _keep_flags(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, keep, ctx.scale = inputs
    ctx.save_for_backward(keep)


drop_rows.register_autograd(
    lambda ctx, gradient: (drop_rows(gradient, *ctx.saved_tensors, ctx.scale), None, None), setup_context=_keep_flags
)


def _check(hidden: Tensor, keys: Tensor, samples: Tensor, positions: Tensor) -> int:
    """How many branches the rows are split among; a :class:`ConfigError` where shapes disagree."""
    rows = hidden.shape[:-1].numel()
    branches = keys.shape[0] if keys.dim() == 2 and keys.shape[1] == 2 else 0
    if samples.shape != (rows,) or positions.shape != (rows,) or not branches or rows % branches:
        raise ConfigError(
            f"hidden states, keys and places disagree (got hidden {tuple(hidden.shape)}, keys {tuple(keys.shape)}, samples "
            f"{tuple(samples.shape)}, positions {tuple(positions.shape)}); give one sample and position a row, and keys of "
            "shape (branches, 2) that share the rows evenly"
        )
    for name, tensor in (("keys", keys), ("samples", samples), ("positions", positions)):
        if tensor.dtype != torch.int64:  # products of narrower ones would draw from another stream
            raise ConfigError(f"{name} must be int64 (got {tensor.dtype}); convert them")
    return branches


def _check_numbers(threshold: int, scale: float) -> None:
    if not 0 <= threshold <= RATE_LEVELS:
        raise ConfigError(f"threshold must lie in 0..{RATE_LEVELS} (got {threshold}); it is floor(65536 rate + 0.5)")
    if not 0 < scale < math.inf:
        raise ConfigError(f"scale must be a finite number above 0 (got {scale}); 1 rescales nothing")


def _check_places(samples: Tensor, positions: Tensor) -> None:
    """What the core asks of the dtypes that it computes, of all others: beyond, lanes of other heads would be drawn."""
    for name, places, least, most in (
        ("sample ids", samples, -1, 1 << 40),
        ("positions", torch.where(samples < 0, 0, positions), 0, 1 << 20),
    ):
        wrong = (places < least) | (places >= most)
        if bool(wrong.any()):
            raise DataError(f"{name} must lie in [{least}, {most}) (got {int(places[wrong][0])}); count them from 0")


def _drop_in_torch(
    key: Tensor, hidden: Tensor, samples: Tensor, positions: Tensor, threshold: int, scale: float
) -> tuple[Tensor, Tensor]:
    keep = row_keep(key, samples, positions, hidden.shape[-1], threshold)
    return drop_hidden(hidden, keep, scale), keep.sum()
