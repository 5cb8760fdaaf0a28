"""Column and span DropKey that costs less than no dropout: dropped keys leave the computation (bidirectional, CPU).

A dropped column is dropped for every query of its head, so kept keys and values are gathered and attention runs on the
shorter ones, one example at a time: padding leaves with them, and neither queries nor outputs have to move. The backward
pass gathers again, so nothing is stored but what attention itself stores.

An example's heads keep different numbers of keys and get one number of places, so some are spare. A mask for them would
cost as much as the dropped keys save. They hold zeros instead: each adds exp(0) = 1 to a denominator and nothing to the
rest, in gradients too, so that dividing it out of the result is exact (and where little else would remain, a mask it is).

Tried and dropped: grouping heads of all examples by their exact count (no spare places, but queries, outputs and two
gradients are copied, which costs what it saves), and counts that are no multiple of 16 (slower than the next one that is).
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
from .reference import repeat_heads

PLACES = 16
"""Kept rows are padded to a multiple of this: matrix products of other sizes are slower."""
MOST_SPARE = 0.5
"""Part of a denominator that may come from spare places: dividing it out loses no more than a bit."""
_AS_NUMPY = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.uint16}
"""Types of numbers, and what NumPy knows them as."""


def attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, real: Tensor, scaling: float) -> Tensor:
    """DropKey attention of one row of kept keys a head: (B, H, Q, D) -> (B, H, Q, D).

    Args:
        query: (B, H, Q, D). key, value: (B, Hkv, K, D) with H a multiple of Hkv; on the CPU, float32, bfloat16 or float16.
        keep: bool (B, Hkv, K), the keys that stay of each head; False at padding.
        real: bool (B, K), the keys that are no padding. A head that keeps none of them gives each query its own value
            (Q = K then); where there is nothing real, zeros.
        scaling: of the logits.

    Raises:
        ConfigError: shapes or types that disagree.

    Example:
        >>> q = torch.randn(1, 2, 4, 8)
        >>> keep = torch.tensor([[[True, False, True, True], [False, True, True, False]]])
        >>> attention(q, q, q, keep, torch.ones(1, 4, dtype=torch.bool), 8**-0.5).shape
        torch.Size([1, 2, 4, 8])
    """
    (query,) = cpu_kernel.readable(query)  # keys and values are gathered
    return _attention(query, key, value, keep, real, scaling)[0]


@torch.library.custom_op("hiddenkey_rs::compact_attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, real: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The output and the logarithm of each row's denominator, float32 (B, H, Q)."""
    _check(query, key, value, keep, real)
    out, total = cpu_kernel.empty(query)
    if not query.shape[2]:  # the kernel divides by their number
        return out, total
    for example in _examples(query, key, value, keep):
        if example.places:
            example.attend(out[example.row], total[example.row], scaling)
        for head, heads in example.lost:
            out[example.number, heads] = _own(value[example.number, head], real[example.number])
    return out, total


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, real: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return cpu_kernel.empty(query)


@torch.library.custom_op("hiddenkey_rs::compact_attention_backward", mutates_args=())
def _gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    real: Tensor,
    out: Tensor,
    total: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    to_query, to_key, to_value = cpu_kernel.like(query), cpu_kernel.like(key), cpu_kernel.like(value)
    if not query.shape[2]:
        return to_query, to_key.zero_(), to_value.zero_()
    (gradient,) = cpu_kernel.readable(gradient)
    for example in _examples(query, key, value, keep):
        n, row = example.number, example.row
        if example.places:
            found = example.differentiate(gradient[row], out[row], total[row], scaling)
            to_query[row] = found[0]
            example.scatter(found[1], to_key)
            example.scatter(found[2], to_value)
        else:
            to_query[n] = to_key[n] = to_value[n] = 0
        for head, heads in example.lost:
            to_query[n, heads] = 0
            to_value[n, head] = _own(gradient[n, heads].sum(dim=0), real[n])
    return to_query, to_key, to_value


@_gradients.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    real: Tensor,
    out: Tensor,
    total: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu_kernel.empty(query)[0], cpu_kernel.like(key), cpu_kernel.like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    return *_gradients(gradient, *ctx.saved_tensors, ctx.scaling), None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


@dataclass
class _Example:
    """One example's shorter keys and values: how many places a head has, and which of them are spare."""

    number: int
    places: int
    keep: Tensor
    counts: Tensor
    """How many keys each head keeps, (Hkv,); all places where it keeps none, whose result is replaced."""
    lost: list[tuple[int, slice]]
    """Heads that keep nothing, each with its query heads."""
    long: tuple[Tensor, Tensor, Tensor]
    room: list[Tensor]

    @property
    def row(self) -> slice:
        return slice(self.number, self.number + 1)

    def attend(self, out: Tensor, total: Tensor, scaling: float) -> None:
        """Attention of the example into ``out`` (1, H, Q, D) and ``total`` (1, H, Q)."""
        tensors, spare = self._tensors(), self._spare
        result, sums = cpu_kernel.forward(*tensors, 0.0, False, scale=scaling)
        if spare is not None:
            part = _weight(spare, sums)
            if not bool((part > MOST_SPARE).any()):
                rest = 1 - part
                torch.mul(result, rest.reciprocal()[..., None], out=out)
                torch.add(sums, rest.log(), out=total)
                return
            result, sums = cpu_kernel.forward(*tensors, 0.0, False, attn_mask=self._mask, scale=scaling)
        out.copy_(result)
        total.copy_(sums)

    def differentiate(self, gradient: Tensor, out: Tensor, total: Tensor, scaling: float) -> tuple[Tensor, ...]:
        """Gradients of the example's queries and shorter keys and values; ``out`` and ``total`` as :meth:`attend` left them."""
        spare = self._spare
        # Beyond this the weight of a spare place might overflow; below, it meets zeros only.
        masked = spare is not None and bool((_weight(spare, total) > MOST_SPARE / (1 - MOST_SPARE)).any())
        mask = self._mask if masked else None
        to_query, *others = cpu_kernel.backward(
            gradient, *self._tensors(), out, total, 0.0, False, attn_mask=mask, scale=scaling
        )
        groups = self.long[0].shape[1] // len(self.counts)
        if groups > 1:
            others = [rows.unflatten(1, (-1, groups)).sum(dim=2) for rows in others]
        return to_query, *others

    def scatter(self, short: Tensor, out: Tensor) -> None:
        """Lay gradients of the kept rows, (1, Hkv, places, D), where they belong; zero elsewhere."""
        inside, laid = _laid(out[self.row])
        flat = short.contiguous().flatten()
        masks.scatter_rows(self.keep.numpy(), self._sizes, _numpy(flat), _numpy(laid), heads_inside=inside)

    @property
    def _sizes(self) -> np.ndarray[Any, Any]:
        return np.array([self.places], dtype=np.uint32)

    @property
    def _spare(self) -> Tensor | None:
        """Spare places of each query head, (H, 1) float32; ``None`` if there are none."""
        spare = self.places - self.counts
        if not bool(spare.any()):
            return None
        return repeat_heads(spare[None, :, None], self.long[0].shape[1])[0].float()

    @property
    def _mask(self) -> Tensor:
        """-inf at spare places, (1, H, 1, places)."""
        filled = torch.arange(self.places) < self.counts[:, None]
        rows = cpu_kernel.forbid(filled, self.long[0].dtype)
        return repeat_heads(rows[None, :, None], self.long[0].shape[1])

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The example's queries, and its kept keys and values: (1, H, Q, D) and twice (1, H, places, D)."""
        query, key, value = (tensor[self.row] for tensor in self.long)
        shape = (1, key.shape[1], self.places, key.shape[-1])
        short = [flat[: math.prod(shape)] for flat in self.room]
        for rows, flat in zip((key, value), short, strict=True):
            inside, laid = _laid(rows)
            masks.gather_rows(self.keep.numpy(), self._sizes, _numpy(laid), _numpy(flat), heads_inside=inside)
        keys, values = (repeat_heads(flat.view(shape), query.shape[1]) for flat in short)
        return query, keys, values


def _examples(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Iterator[_Example]:
    batch, heads, length, features = key.shape
    keep = keep.contiguous()
    counts = keep.sum(dim=-1, dtype=torch.int32)
    most = counts.amax(dim=1).tolist() if heads else [0] * batch
    places = [min(-(-count // PLACES) * PLACES, length) for count in most]
    # One example after the other in the same memory: it stays in the cache, and nothing new has to be mapped.
    room = [key.new_empty(heads * max(places, default=0) * features) for _ in range(2)]
    key, value = (rows if _laid(rows)[1].data_ptr() == rows.data_ptr() else rows.contiguous() for rows in (key, value))
    laid = (query, key, value)
    groups = query.shape[1] // max(heads, 1)
    for number in range(batch):
        count = counts[number]
        lost = [(head, slice(head * groups, (head + 1) * groups)) for head in (count == 0).nonzero().flatten().tolist()]
        filled = count.masked_fill(count == 0, places[number])
        yield _Example(number, places[number], keep[number : number + 1], filled, lost, laid, room)


def _check(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, real: Tensor) -> None:
    batch, heads, length, _ = key.shape
    fits = len(query) == batch and value.shape == key.shape and query.shape[-1] == key.shape[-1]
    fits = fits and bool(heads) and query.shape[1] % heads == 0
    if not fits or keep.shape != (batch, heads, length) or real.shape != (batch, length):
        raise ConfigError(
            f"queries, keys, values and masks disagree (got {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}, {tuple(keep.shape)}, {tuple(real.shape)}); one mask a key/value head"
        )
    if not cpu_kernel.runs_on(query):
        raise ConfigError(
            f"keys are gathered on the CPU in float32, bfloat16 and float16 (got {query.dtype} on {query.device}); "
            "use a boolean mask"
        )
    cpu_kernel.check_types(query, key, value)


def _weight(spare: Tensor, total: Tensor) -> Tensor:
    """What part of each denominator spare places are; 0 where there are none, however small the denominator is."""
    return torch.where(spare > 0, spare * (-total).exp(), 0.0)


def _own(rows: Tensor, real: Tensor) -> Tensor:
    """One head's rows (K, D), zero at padding; where there is nothing else, 0: queries are not as many as keys then."""
    return rows.masked_fill(~real[:, None], 0.0) if real.any() else rows.new_zeros(())


def _laid(rows: Tensor) -> tuple[bool, Tensor]:
    """Whether heads lie inside rows in memory, and the contiguous tensor that says so."""
    swapped = rows.transpose(1, 2)
    return (True, swapped) if swapped.is_contiguous() else (False, rows.contiguous())


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.view(_AS_NUMPY[tensor.dtype]).numpy()
