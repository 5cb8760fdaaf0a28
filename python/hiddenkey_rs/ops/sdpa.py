"""DropKey through torch's scaled dot-product attention with a boolean mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import repeat_heads


def obstacle(position: str, bias: Tensor | None, softcap: float | None, sinks: Tensor | None) -> str | None:
    """Why SDPA cannot compute this attention, or ``None`` if it can."""
    if position != "dropkey":
        return f"it drops before softmax only, not position {position!r}"
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    if sinks is not None:
        return "it has no attention sinks"
    if bias is not None:
        return "a boolean mask leaves no room for an additive bias"
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kept: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """DropKey attention over a kept set; arguments and result as :func:`.reference.attention`."""
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    if kept is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    # What SDPA makes of a row without keys differs by version and backend (zeros, a mean, NaN): it never sees one.
    empty = ~kept.any(dim=-1, keepdim=True)
    asking = kept.device.type == "cpu" and not torch.compiler.is_compiling()  # free on the host, and saves a copy
    if asking and not bool(empty.any()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=kept, dropout_p=dropout, scale=scaling)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=kept | empty, dropout_p=dropout, scale=scaling)
    return output.masked_fill(empty, 0.0)
