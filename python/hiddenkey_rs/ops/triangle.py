"""Column DropKey under a plain causal mask: one call of torch's kernel, which skips what lies above the diagonal (CPU).

The kernel takes its own causal mask and numbers to add together, and those may be one row a head: dropped columns and
padding are -inf there, so no mask of pairs exists, and nothing is cut into blocks or added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cpu_kernel


@dataclass
class Triangle:
    """Which keys a causal attention uses: those that stay, up to each query's own."""

    stays: Tensor
    """bool (1 or B, 1 or H, 1, K): keys that are kept and no padding."""
    lost: Tensor | None
    """bool (B, H, Q): queries that keep only their own key, if there are any. They see no other, so that nothing that the
    kernel makes for them reaches a gradient."""
    silent: Tensor | None
    """bool (1 or B, 1, Q, 1): queries that may attend to nothing, if there are any."""
    kept: int
    """Pairs, of all heads."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """The output, (B, H, Q, D), and the logarithm of each row's denominator, float32 (B, H, Q)."""
        mask = cpu_kernel.forbid(self.stays, query.dtype)
        out, total = cpu_kernel.forward(query, key, value, 0.0, True, attn_mask=mask, scale=scaling)
        if self.silent is not None:
            out.masked_fill_(self.silent, 0.0)
            total.masked_fill_(self.silent[..., 0], torch.inf)  # what backward makes of the keys before them is 0
        if self.lost is not None:
            out[self.lost] = value[self.lost]
            total[self.lost] = 0.0
        # The kernel lays its output out as the queries lie; a copy only where that is another layout than was promised.
        return out.transpose(1, 2).contiguous().transpose(1, 2), total

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        total: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values; ``out`` and ``total`` as :meth:`forward` left them."""
        mask = cpu_kernel.forbid(self.stays, query.dtype)
        arriving = gradient if self.silent is None else gradient.masked_fill(self.silent, 0.0)
        tensors = arriving, query, key, value, out, total
        to_query, to_key, to_value = cpu_kernel.backward(*tensors, 0.0, True, attn_mask=mask, scale=scaling)
        if self.lost is not None:
            to_value[self.lost] += gradient[self.lost]
        return to_query, to_key, to_value


def find(seen: np.ndarray[Any, Any], keep: Tensor, own: bool, batch: int, heads: int) -> Triangle | None:
    """The triangle of a model's mask and a drawn one, or ``None`` where they make none.

    Args:
        seen: (1 or B, Q, 3), :func:`..masks.seen_keys` of the model's mask. keep: bool (1 or B, 1 or H, 1 or Q, K).
        own: a query that lost all its keys keeps its own one. batch, heads: B and H.

    A mask is one if every query may attend to all of its example's keys, which stand side by side, up to its own; or to
    nothing. Heads that keep no key at all are left to others: padding behind them would be rescued in another way.
    """
    queries, keys = seen.shape[1], keep.shape[3]
    if queries != keys or keep.shape[2] != 1 or not queries:
        return None
    first, end, many = (seen[..., place].astype(np.int64) for place in range(3))
    begins, stops = first.min(axis=1, keepdims=True), end.max(axis=1, keepdims=True)
    upto = np.minimum(np.arange(1, keys + 1), stops)
    silent = many == 0
    if not bool((silent | ((first == begins) & (end == upto) & (many == end - first))).all()):
        return None
    places = np.arange(keys)
    inside = torch.from_numpy((places >= begins) & (places < stops))[:, None, None]
    stays = keep & inside
    some = stays.any(dim=-1)
    if not bool((some | ~inside.any(dim=-1)).all()):
        return None
    # The first key of each head that stays: queries before it lost all of theirs.
    start = torch.where(some, stays.to(torch.uint8).argmax(dim=-1), 0)
    quiet = torch.from_numpy(silent)[:, None]
    lost = (torch.arange(queries) < start) & ~quiet
    alone = bool(lost.any())
    if alone and not own:
        return None
    # How many queries see a key: those whose range ends behind it.
    ends = np.zeros((len(end), keys + 1), dtype=np.int64)
    np.add.at(ends, (np.arange(len(end))[:, None], end), ~silent)
    seeing = torch.from_numpy(ends[:, :0:-1].cumsum(axis=1)[:, ::-1].copy())[:, None, None]
    shape = torch.broadcast_shapes(stays.shape, seeing.shape)
    repeats = batch // max(shape[0], 1) * (heads // shape[1])
    kept = int((stays * seeing).sum() + lost.sum()) * repeats
    return Triangle(
        stays,
        lost.expand(batch, heads, queries) if alone else None,
        quiet[..., None] if bool(quiet.any()) else None,
        kept,
    )
