"""DropKey under a mask that differs by query (causal, sliding window, packed documents), a block of queries at a time (CPU).

Of each block only the range of keys that some of its queries may attend to takes part, so a causal mask costs little more
than half; and the mask over queries and keys exists for one block, never whole.

Tried and dropped: carrying the dropped columns in an additional feature of queries and keys, which needs no mask (torch's
kernel skips nothing under it at these lengths, and is slower by the odd feature).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from . import cpu_kernel


def block_rows(queries: int) -> int:
    """Queries of a block: fewer skip more keys, but make smaller matrix products. Measured on both sides of 1024."""
    return 64 if queries < 1024 else 128


def attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, keep: Tensor, rescue: str, scaling: float
) -> tuple[Tensor, Tensor]:
    """DropKey attention: the output, (B, H, Q, D), and how many pairs were kept, int64 ().

    Args:
        query: (B, H, Q, D). key, value: (B, H, K, D), on the CPU, float32, bfloat16 or float16.
        allowed: bool (1 or B, 1, Q, K). keep: bool (B, H, 1 or Q, K), the drawn mask.
        rescue: as :func:`.reference.kept_set`. scaling: of the logits.

    Raises:
        ConfigError: shapes or types that disagree.

    Example:
        >>> from .reference import causal
        >>> q = torch.randn(1, 2, 4, 8)
        >>> keep = torch.tensor([[[[True, False, True, True]], [[False, True, True, False]]]])
        >>> out, kept = attention(q, q, q, causal(4, 4), keep, "own", 8**-0.5)
        >>> out.shape, int(kept)
        (torch.Size([1, 2, 4, 8]), 13)
    """
    out, _, kept = _attention(query, key, value, allowed, keep, rescue == "own", scaling)
    return out, kept


@torch.library.custom_op("hiddenkey_rs::blocked_attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, keep: Tensor, own: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the logarithm of each row's denominator, float32 (B, H, Q), and how many pairs were kept."""
    _check(query, key, value, allowed, keep)
    out, total = cpu_kernel.empty(query)
    count = 0
    for rows, columns, mask, empty, kept in _blocks(query, allowed, keep, own):
        count += kept
        if mask is None:
            out[:, :, rows] = 0
            continue
        parts = query[:, :, rows], key[:, :, columns], value[:, :, columns]
        out[:, :, rows], total[:, :, rows] = cpu_kernel.forward(*parts, 0.0, False, attn_mask=mask, scale=scaling)
        if empty is not None:
            out[:, :, rows].masked_fill_(empty, 0.0)
    return out, total, torch.tensor(count)


@_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, keep: Tensor, own: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return *cpu_kernel.empty(query), query.new_empty((), dtype=torch.int64)


@torch.library.custom_op("hiddenkey_rs::blocked_attention_backward", mutates_args=())
def _gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    keep: Tensor,
    out: Tensor,
    total: Tensor,
    own: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    to_query, to_key, to_value = cpu_kernel.like(query), cpu_kernel.like(key).zero_(), cpu_kernel.like(value).zero_()
    for rows, columns, mask, empty, _ in _blocks(query, allowed, keep, own):
        if mask is None:
            to_query[:, :, rows] = 0
            continue
        arriving = gradient[:, :, rows] if empty is None else gradient[:, :, rows].masked_fill(empty, 0.0)
        parts = query[:, :, rows], key[:, :, columns], value[:, :, columns], out[:, :, rows], total[:, :, rows]
        found = cpu_kernel.backward(arriving, *parts, 0.0, False, attn_mask=mask, scale=scaling)
        to_query[:, :, rows] = found[0]
        to_key[:, :, columns] += found[1]
        to_value[:, :, columns] += found[2]
    return to_query, to_key, to_value


@_gradients.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    keep: Tensor,
    out: Tensor,
    total: Tensor,
    own: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu_kernel.like(query), cpu_kernel.like(key), cpu_kernel.like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.own, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
    return *_gradients(gradient, *ctx.saved_tensors, ctx.own, ctx.scaling), None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)

_Block = tuple[slice, slice, Tensor | None, Tensor | None, int]


def _blocks(query: Tensor, allowed: Tensor, keep: Tensor, own: bool) -> Iterator[_Block]:
    """Each block's queries, the keys they may see, -inf where they may not, the rows that see none, and pairs kept."""
    batch, heads = query.shape[:2]
    seen = allowed.any(dim=0)[0]
    step = block_rows(query.shape[2])
    for start in range(0, query.shape[2], step):
        rows = slice(start, min(start + step, query.shape[2]))
        found = seen[rows].any(dim=0).nonzero()
        if not len(found):
            yield rows, slice(0, 0), None, None, 0
            continue
        columns = slice(int(found[0]), int(found[-1]) + 1)
        permitted = allowed[:, :, rows, columns]
        drawn = keep[:, :, rows if keep.shape[2] > 1 else slice(0, 1), columns]
        # Kept keys a query, (B, H, rows): counted by a matrix product where all queries of a head drop the same ones.
        if keep.shape[2] > 1:
            counts = (permitted & drawn).sum(dim=-1)
        else:
            counts = torch.matmul(permitted.float(), drawn.float().transpose(-1, -2)).squeeze(-1).long()
        mask = torch.minimum(cpu_kernel.forbid(permitted, query.dtype), cpu_kernel.forbid(drawn, query.dtype))
        count, empty = int(counts.sum()) * (batch // counts.shape[0]), None
        without = counts == 0
        if bool(without.any()):
            example, head, row = without.nonzero().unbind(dim=1)
            rescued = _fallback(permitted, rows, columns, own).expand(batch, 1, -1, -1)[example, 0, row]
            count += int(rescued.count_nonzero())
            none = ~rescued.any(dim=-1)
            mask[example, head, row] = cpu_kernel.forbid(rescued | none[:, None], query.dtype)
            if bool(none.any()):
                empty = torch.zeros(batch, heads, rows.stop - rows.start, 1, dtype=torch.bool)
                empty[example[none], head[none], row[none]] = True
        yield rows, columns, mask, empty, count


def _fallback(permitted: Tensor, rows: slice, columns: slice, own: bool) -> Tensor:
    """What queries keep whose allowed keys were all dropped: their own key, or all allowed ones."""
    if not own:
        return permitted
    row, column = torch.arange(rows.start, rows.stop)[:, None], torch.arange(columns.start, columns.stop)
    mine = (row == column) & permitted
    return torch.where(mine.any(dim=-1, keepdim=True), mine, permitted)


def _check(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, keep: Tensor) -> None:
    batch, heads, queries, features = query.shape
    keys = key.shape[2]
    fits = key.shape == value.shape == (batch, heads, keys, features)
    fits = fits and allowed.shape[1:] == (1, queries, keys) and allowed.shape[0] in (1, batch)
    if not fits or keep.shape[:2] != (batch, heads) or keep.shape[3] != keys or keep.shape[2] not in (1, queries):
        raise ConfigError(
            f"queries, keys, values and masks disagree (got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}, {tuple(allowed.shape)}, {tuple(keep.shape)}); repeat grouped heads first"
        )
    if not cpu_kernel.runs_on(query):
        raise ConfigError(
            f"blocks of queries run on the CPU in float32, bfloat16 and float16 (got {query.dtype} on {query.device}); "
            "use impl='sdpa'"
        )
