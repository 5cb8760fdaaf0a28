"""DropKey under a mask that differs by query (causal, sliding window, packed documents), a block of queries at a time (CPU).

Of each block only the range of keys that some of its queries may attend to takes part, so a causal mask costs little more
than half; and the mask over queries and keys exists for one block, never whole. Columns under a plain causal mask need
no blocks (:mod:`.triangle`).

Tried and dropped: carrying the dropped columns in an additional feature of queries and keys, which needs no mask (torch's
kernel skips nothing under it at these lengths, and is slower by the odd feature).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import masks
from ..errors import ConfigError
from . import cpu_kernel
from .triangle import Triangle, find

MASK_BYTES = 8 << 20
"""Memory of a block's mask, where one example does not need more: the kernel finds it in the cache."""
_FORBIDDEN = {torch.float32: 0xFF800000, torch.bfloat16: 0xFF80, torch.float16: 0xFC00}
"""The bits of -inf."""


def block_rows(queries: int) -> int:
    """Queries of a block: fewer skip more keys, but make smaller matrix products. Measured on both sides of 1024."""
    return 64 if queries < 1024 else 128


def attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, keep: Tensor, rescue: str, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """DropKey attention: the output, (B, H, Q, D), and how many pairs were kept and allowed, both int64 ().

    Args:
        query: (B, H, Q, D). key, value: (B, H, K, D), on the CPU, float32, bfloat16 or float16.
        allowed: bool (1 or B, 1, Q, K). keep: bool (1 or B, 1 or H, 1 or Q, K), the drawn mask.
        rescue: as :func:`.reference.kept_set`. scaling: of the logits.

    Raises:
        ConfigError: shapes or types that disagree.

    Example:
        >>> from .reference import causal
        >>> q = torch.randn(1, 2, 4, 8)
        >>> keep = torch.tensor([[[[True, False, True, True]], [[False, True, True, False]]]])
        >>> out, kept, total = attention(q, q, q, causal(4, 4), keep, "own", 8**-0.5)
        >>> out.shape, int(kept), int(total)
        (torch.Size([1, 2, 4, 8]), 13, 20)
    """
    query, key, value = cpu_kernel.readable(query, key, value)
    out, _, counts = _attention(query, key, value, allowed, keep, rescue == "own", scaling)
    kept, total = counts.unbind()
    return out, kept, total


@torch.library.custom_op("hiddenkey_rs::blocked_attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, keep: Tensor, own: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the logarithm of each row's denominator, float32 (B, H, Q), and pairs kept and allowed, int64 (2,)."""
    blocks = _Blocks(query, key, value, allowed, keep, own)
    triangle = blocks.triangle()
    if triangle is not None:
        out, total = triangle.forward(query, key, value, scaling)
        return out, total, torch.tensor([triangle.kept, blocks.allowed_pairs])
    out, total = cpu_kernel.empty(query)
    kept = 0
    for block in blocks:
        kept += block.kept
        rows = block.queries(out)
        if block.mask is None:
            rows.zero_()
            continue
        parts = block.queries(query), block.keys(key), block.keys(value)
        found = cpu_kernel.forward(*parts, 0.0, False, attn_mask=block.mask, scale=scaling)
        rows.copy_(found[0])
        block.queries(total).copy_(found[1])
        if block.empty is not None:
            rows.masked_fill_(block.empty, 0.0)
    return out, total, torch.tensor([kept, blocks.allowed_pairs])


@_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, keep: Tensor, own: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return *cpu_kernel.empty(query), query.new_empty((2,), dtype=torch.int64)


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
    (gradient,) = cpu_kernel.readable(gradient)
    blocks = _Blocks(query, key, value, allowed, keep, own)
    triangle = blocks.triangle()
    if triangle is not None:
        return triangle.backward(gradient, query, key, value, out, total, scaling)
    to_query, to_key, to_value = (cpu_kernel.like(rows) for rows in (query, key, value))
    if not blocks.queries:  # nobody asks, so no block is the first one
        return to_query, to_key.zero_(), to_value.zero_()
    for block in blocks:
        if block.first:
            for whole in (to_key, to_value):
                block.examples(whole).zero_()
        if block.mask is None:
            block.queries(to_query).zero_()
            continue
        arriving = block.queries(gradient)
        if block.empty is not None:
            arriving = arriving.masked_fill(block.empty, 0.0)
        parts = block.queries(query), block.keys(key), block.keys(value), block.queries(out), block.queries(total)
        found = cpu_kernel.backward(arriving, *parts, 0.0, False, attn_mask=block.mask, scale=scaling)
        block.queries(to_query).copy_(found[0])
        block.keys(to_key).add_(found[1])
        block.keys(to_value).add_(found[2])
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


@dataclass
class _Block:
    """Some queries of some examples, and the keys that they may see."""

    of: slice
    rows: slice
    columns: slice
    mask: Tensor | None
    """-inf where a pair is not kept; ``None`` where no query of the block sees any key."""
    empty: Tensor | None
    """Rows that see no key, if there are any; their mask forbids nothing."""
    kept: int
    """Pairs."""
    first: bool
    """Whether it is the first block of its examples."""

    def examples(self, tensor: Tensor) -> Tensor:
        """Their part of something."""
        return tensor[self.of]

    def queries(self, tensor: Tensor) -> Tensor:
        """Their part of something of the shape (B, H, Q, ...)."""
        return tensor[self.of, :, self.rows]

    def keys(self, tensor: Tensor) -> Tensor:
        """Their part of something of the shape (B, H, K, ...)."""
        return tensor[self.of, :, self.columns]


class _Blocks:
    """All blocks of an attention, one behind the other, their masks in the same memory."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, keep: Tensor, own: bool) -> None:
        _check(query, key, value, allowed, keep)
        self.own, self.dtype = own, query.dtype
        self.batch, self.heads, self.queries, _ = query.shape
        self.allowed, self.keep = _dense(allowed), _dense(keep)
        self.seen = masks.seen_keys(self.allowed.numpy())
        self.step = block_rows(self.queries)
        shared = len(self.allowed) == len(self.keep) == 1  # one mask for all examples
        each = self.keep.shape[1] * self.step * key.shape[2] * query.element_size()
        self.many = self.batch if shared else max(1, MASK_BYTES // max(each, 1))
        self.together = 1 if shared else min(self.many, self.batch)

    def triangle(self) -> Triangle | None:
        """What computes all of it at once, if the mask is plainly causal."""
        return find(self.seen, self.keep, self.own, self.batch, self.heads)

    @property
    def allowed_pairs(self) -> int:
        """How many pairs of all heads the model's own mask allows."""
        return int(self.seen[..., 2].sum(dtype=np.int64)) * (self.batch // max(len(self.allowed), 1)) * self.heads

    def __iter__(self) -> Iterator[_Block]:
        self.room = torch.empty(self.together * self.keep.shape[1] * self.step * self.keep.shape[3], dtype=self.dtype)
        for start in range(0, self.batch, self.many):
            examples = slice(start, min(start + self.many, self.batch))
            first = True
            for row in range(0, self.queries, self.step):
                yield self._block(examples, slice(row, min(row + self.step, self.queries)), first)
                first = False

    def _block(self, examples: slice, rows: slice, first: bool) -> _Block:
        allowed = self.allowed[examples] if len(self.allowed) > 1 else self.allowed
        seen = self.seen[examples] if len(self.seen) > 1 else self.seen
        keep = self.keep[examples] if len(self.keep) > 1 else self.keep
        here = seen[:, rows]
        columns = slice(int(here[..., 0].min()), int(here[..., 1].max()))
        if columns.stop == 0:
            return _Block(examples, rows, columns, None, None, 0, first)
        shape = (max(len(allowed), len(keep)), keep.shape[1], rows.stop - rows.start)
        size = math.prod(shape) * (columns.stop - columns.start)
        flat, empty = self.room[:size], torch.empty(math.prod(shape), dtype=torch.bool)
        kept, without = masks.block_mask(
            allowed.numpy(),
            seen,
            keep.numpy(),
            self.own,
            (rows.start, rows.stop),
            (columns.start, columns.stop),
            _FORBIDDEN[self.dtype],
            cpu_kernel.bits(flat),
            empty.numpy(),
        )
        repeats = (examples.stop - examples.start) // shape[0] * (self.heads // shape[1])
        mask = flat.view(*shape, columns.stop - columns.start)
        return _Block(examples, rows, columns, mask, empty.view(*shape, 1) if without else None, kept * repeats, first)


def _dense(mask: Tensor) -> Tensor:
    """The mask in contiguous memory, one that is the same for all examples only once."""
    return (mask[:1] if mask.stride(0) == 0 else mask).contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, keep: Tensor) -> None:
    batch, heads, queries, features = query.shape
    keys = key.shape[2]
    fits = key.shape == value.shape == (batch, heads, keys, features)
    fits = fits and allowed.shape[0] in (1, batch) and allowed.shape[1:] == (1, queries, keys)
    fits = fits and keep.dim() == 4 and keep.shape[0] in (1, batch) and keep.shape[1] in (1, heads)
    if not fits or keep.shape[2] not in (1, queries) or keep.shape[3] != keys:
        raise ConfigError(
            f"queries, keys, values and masks disagree (got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}, {tuple(allowed.shape)}, {tuple(keep.shape)}); repeat grouped heads first"
        )
    if not cpu_kernel.runs_on(query):
        raise ConfigError(
            f"blocks of queries run on the CPU in float32, bfloat16 and float16 (got {query.dtype} on {query.device}); "
            "use impl='sdpa'"
        )
    cpu_kernel.check_types(query, key, value)
