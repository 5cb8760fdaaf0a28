"""DropKey through torch's scaled dot-product attention with a boolean mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import repeat_heads

SHORT = 192
"""In 16 bits on the CPU the kernel takes 16 (16 tokens), 4 (128) or 2 times (192) what the products take, both passes."""


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


def is_short(query: Tensor, key: Tensor) -> bool:
    """Whether plain products beat torch's kernel: on the CPU in 16 bits, up to :data:`SHORT` queries and keys."""
    half = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    return half and max(query.shape[2], key.shape[2]) <= SHORT


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
    if is_short(query, key) and not dropout:
        return _products(query, key, value, kept, scaling)
    if kept is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    # What SDPA makes of a row without keys differs by version and backend (zeros, a mean, NaN): it never sees one.
    empty = ~kept.any(dim=-1, keepdim=True)
    asking = kept.device.type == "cpu" and not torch.compiler.is_compiling()  # free on the host, and saves a copy
    if asking and not bool(empty.any()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=kept, dropout_p=dropout, scale=scaling)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=kept | empty, dropout_p=dropout, scale=scaling)
    return output.masked_fill(empty, 0.0)


def _products(query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None, scaling: float | None) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = ((query * scale) @ key.transpose(-1, -2)).float()
    if kept is None:
        return logits.softmax(dim=-1).to(value.dtype) @ value
    # Not -inf: a row without keys would be NaN, before its output is emptied.
    weights = logits.masked_fill(~kept, torch.finfo(logits.dtype).min).softmax(dim=-1).to(value.dtype)
    return (weights @ value).masked_fill(~kept.any(dim=-1, keepdim=True), 0.0)
