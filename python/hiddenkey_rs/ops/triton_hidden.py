"""Dropout on hidden states in Triton: drawn from the counter forward and backward, residual added in the same pass.

Equal, bit for bit, to :func:`.hidden.drop_hidden` followed by the addition: the product is rounded to the dtype before
the residual joins it. No mask is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from .triton_launch import Launch, Ready, kernels, unwatched
from .triton_launch import unable as obstacle

__all__ = ["drop_elements", "drop_rows", "obstacle"]

_ROWS, _COLUMNS, _WARPS = 32, 128, 4
_READY, _CHECKED = Ready(), Ready()


def drop_elements(
    hidden: Tensor,
    keys: Tensor,
    samples: Tensor,
    positions: Tensor,
    threshold: int,
    scale: float,
    *,
    residual: Tensor | None = None,
    count: bool | Tensor = False,
) -> tuple[Tensor, Tensor]:
    """Element pattern: ``out = residual + (keep ? hidden * scale : 0)`` (paper, eq. 8).

    Args:
        hidden: (..., D), float16, bfloat16 or float32; N rows in all. residual: like it, or ``None`` for none.
        keys: int64 (branches, 2), site keys of as many equal parts of the rows.
        samples: int64 (N,), each row's example, or -1 for padding, of which nothing is kept.
        positions: int64 (N,), each row's place in its example.
        threshold: of the rate, 0..65535. scale: 1 / (1 - realised rate) for inverted dropout, 1 for none.
        count: count the kept places; a zero, int64 () on their device, to have them counted in there.

    Returns:
        (out, kept): like ``hidden``; int64 (), how many places were kept, 0 unless counted.

    Raises:
        ConfigError: what Triton cannot compute, or shapes, dtypes and devices that disagree.
    """
    if not unwatched(hidden):
        _check_elements(hidden, residual, keys, samples, positions, threshold)
        outputs: tuple[Tensor, Tensor] = drop_forward(
            hidden, residual, keys, samples, positions, threshold, scale, count is not False
        )
        return outputs
    given = (hidden, residual, keys, samples, positions)
    place = (threshold, *(None if part is None else (part.shape, part.dtype, part.device) for part in given))
    if place not in _CHECKED:
        _check_elements(*given, threshold)
        _CHECKED.keep(place, True)
    counts = count if isinstance(count, Tensor) else samples.new_zeros(())
    places = (keys.contiguous(), samples.contiguous(), positions.contiguous())
    out = _DropElements.apply(hidden, residual, places, threshold, scale, None if count is False else counts)
    return out, counts


def _check_elements(
    hidden: Tensor, residual: Tensor | None, keys: Tensor, samples: Tensor, positions: Tensor, threshold: int
) -> None:
    rows = _check(hidden, residual, keys=keys, samples=samples, positions=positions)
    fits = keys.dim() == 2 and keys.shape[1] == 2 and keys.shape[0] and rows % keys.shape[0] == 0
    if samples.shape != (rows,) or positions.shape != (rows,) or not fits:
        raise ConfigError(
            f"hidden states, keys and places disagree (got hidden {tuple(hidden.shape)}, keys {tuple(keys.shape)}, samples "
            f"{tuple(samples.shape)}, positions {tuple(positions.shape)}); give one sample and position a row, and keys of "
            "shape (branches, 2) that share the rows evenly"
        )
    for name, tensor in (("keys", keys), ("samples", samples), ("positions", positions)):
        if tensor.dtype != torch.int64:
            raise ConfigError(f"{name} must be int64 (got {tensor.dtype}); convert them")
    if not 0 <= threshold <= 65535:
        raise ConfigError(f"threshold must lie in 0..65535 (got {threshold}); use a rate below 1")


def drop_rows(hidden: Tensor, keep: Tensor, scale: float, *, residual: Tensor | None = None) -> Tensor:
    """Column and span patterns: whole rows go, ``out = residual + (keep ? hidden * scale : 0)``.

    Args:
        hidden: (..., D), float16, bfloat16 or float32; N rows in all. residual: like it, or ``None`` for none.
        keep: bool (N,), one flag a row, False at padding. scale: of the rows that stay.

    Raises:
        ConfigError: what Triton cannot compute, or shapes, dtypes and devices that disagree.
    """
    rows = _check(hidden, residual, keep=keep)
    if keep.shape != (rows,) or keep.dtype != torch.bool:
        raise ConfigError(
            f"keep must hold one bool a row of hidden states (got {keep.dtype} of shape {tuple(keep.shape)} for "
            f"{rows} rows); flatten batch and length alike"
        )
    drop = _DropRows.apply if unwatched(hidden) else drop_rows_forward
    out: Tensor = drop(hidden, residual, keep, scale)
    return out


def _check(hidden: Tensor, residual: Tensor | None, **beside: Tensor) -> int:
    """The number of rows; a :class:`ConfigError` for what no kernel may start with."""
    reason = obstacle(hidden)
    if reason is not None:
        raise ConfigError(f"Triton cannot drop these hidden states: {reason} (got impl='triton'); use impl='auto'")
    if not hidden.dim():
        raise ConfigError("hidden states have no features (got a single number); give shape (..., features)")
    if residual is not None and (
        residual.shape != hidden.shape or residual.dtype != hidden.dtype or residual.device != hidden.device
    ):
        raise ConfigError(
            f"residual differs from the hidden states (got {residual.dtype} {tuple(residual.shape)} on {residual.device}, "
            f"not {hidden.dtype} {tuple(hidden.shape)} on {hidden.device}); cast or expand it"
        )
    for name, tensor in beside.items():
        if tensor.device != hidden.device:
            raise ConfigError(
                f"{name} must be on the hidden states' device (got {tensor.device}, not {hidden.device}); move it"
            )
    return hidden.numel() // max(hidden.shape[-1], 1)


def _elements(
    hidden: Tensor,
    residual: Tensor | None,
    keys: Tensor,
    samples: Tensor,
    positions: Tensor,
    threshold: int,
    scale: float,
    count: bool,
) -> tuple[Tensor, Tensor]:
    """Behind :func:`drop_elements`, which checks."""
    counts = torch.zeros((), dtype=torch.int64, device=hidden.device)
    places = (keys.contiguous(), samples.contiguous(), positions.contiguous())
    return _launch(hidden, residual, places, None, scale, threshold, counts if count else None), counts


def _rows(hidden: Tensor, residual: Tensor | None, keep: Tensor, scale: float) -> Tensor:
    """Behind :func:`drop_rows`, which checks."""
    return _launch(hidden, residual, None, keep.contiguous(), scale)


def _launch(
    hidden: Tensor,
    residual: Tensor | None,
    places: tuple[Tensor, Tensor, Tensor] | None,
    keep: Tensor | None,
    scale: float,
    threshold: int = 0,
    counts: Tensor | None = None,
) -> Tensor:
    """The result; adds how many places were kept to ``counts``."""
    features = hidden.shape[-1]
    flat = hidden.reshape(-1, features) if hidden.numel() else hidden.new_empty(0, max(features, 1))
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    added = flat if residual is None else residual.reshape(flat.shape)
    added = added if added.stride(1) == 1 else added.contiguous()
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    # Tensors that there is no use for: any pointer does.
    keys, samples, positions = places or (out,) * 3
    parts = None if places is None else keys.numel() // 2
    how = (parts, residual is not None, counts is not None, scale, threshold)
    place = (flat.shape, flat.stride(0), added.stride(0), hidden.dtype, hidden.device, *how)
    launch: Launch | None = _READY.get(place)
    if launch is None:
        launch = _READY.keep(place, _made(flat, added, *how))
    launch(
        flat, added, out, keys if counts is None else counts, keys, samples, positions, keys if keep is None else keep
    )
    return out


def _made(
    flat: Tensor, added: Tensor, parts: int | None, residual: bool, counted: bool, scale: float, threshold: int
) -> Launch:
    """The launch for rows (N, D) like these, in so many parts of one key each."""
    rows, features = flat.shape
    blocks = -(-features // _COLUMNS)
    numbers = (
        flat.stride(0), added.stride(0), features, rows, rows // (parts or 1), blocks, float(scale), threshold
    )  # fmt: skip
    constants = {
        "FEATURES": features,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        "ELEMENT": parts is not None,
        "RESIDUAL": residual,
        "COUNT": counted,
        "num_warps": _WARPS,
        # A fused multiply-add would round once where the unfused operations round twice.
        "enable_fp_fusion": False,
    }
    return Launch(kernels("hidden_kernel").drop_kernel, -(-rows // _ROWS) * blocks, numbers, constants, flat.device)


drop_forward = torch.library.custom_op("hiddenkey_rs::triton_drop_elements", _elements, mutates_args=())
drop_rows_forward = torch.library.custom_op("hiddenkey_rs::triton_drop_rows", _rows, mutates_args=())


@drop_forward.register_fake
def _(hidden: Tensor, residual: Tensor | None, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), keys.new_empty(())


@drop_rows_forward.register_fake
def _(hidden: Tensor, residual: Tensor | None, keep: Tensor, scale: float) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _keep_coordinates(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, residual, keys, samples, positions, ctx.threshold, ctx.scale, _ = inputs
    ctx.residual = residual is not None
    ctx.save_for_backward(keys, samples, positions)
    ctx.mark_non_differentiable(output[1])


def _drop_gradient(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    dropped, _ = drop_forward(gradient, None, *ctx.saved_tensors, ctx.threshold, ctx.scale, False)
    return dropped, gradient if ctx.residual else None, None, None, None, None, None, None


def _keep_flags(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, residual, keep, ctx.scale = inputs
    ctx.residual = residual is not None
    ctx.save_for_backward(keep)


def _drop_rows_gradient(ctx: Any, gradient: Tensor, drop: Any = drop_rows_forward) -> tuple[Any, ...]:
    dropped = drop(gradient, None, *ctx.saved_tensors, ctx.scale)
    return dropped, gradient if ctx.residual else None, None, None


drop_forward.register_autograd(_drop_gradient, setup_context=_keep_coordinates)
drop_rows_forward.register_autograd(_drop_rows_gradient, setup_context=_keep_flags)


class _DropElements(torch.autograd.Function):
    """What the operator does, where nobody watches it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, residual: Tensor | None, places: Any, *how: Any) -> Tensor:
        threshold, scale, counts = how
        ctx.how, ctx.residual = (scale, threshold), residual is not None
        ctx.save_for_backward(*places)
        return _launch(hidden, residual, places, None, scale, threshold, counts)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dropped = _launch(gradient, None, ctx.saved_tensors, None, *ctx.how)
        return dropped, gradient if ctx.residual else None, None, None, None, None


class _DropRows(torch.autograd.Function):
    """What the operator does, where nobody watches it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _rows(*inputs)
        _keep_flags(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _drop_rows_gradient(ctx, gradient, _rows)
