"""Dropout on hidden states: HiddenCut, and the input and output positions."""

from __future__ import annotations

from torch import Tensor

from .generator import span_length


def drop_hidden(hidden: Tensor, keep: Tensor, scale: float = 1.0) -> Tensor:
    """``hidden`` with dropped places exactly zero and kept ones times ``scale``.

    Args:
        hidden: (B, L, D), any float dtype. keep: bool (B, L, D), or (B, L, 1) for whole tokens.
        scale: 1 / (1 - realised rate) for inverted dropout, 1 for none.

    A dropped infinity or NaN becomes zero too, and its gradient is zero: the place is gone, not multiplied.
    """
    if scale == 1.0:
        return hidden.masked_fill(~keep, 0.0)
    return (hidden * scale).masked_fill_(~keep, 0.0)


def guided_span(received: Tensor, real: Tensor, lengths: Tensor, draws: Tensor, threshold: int) -> Tensor:
    """HiddenCut's attention-guided span: keep mask (B, L), bool, False at padding.

    The span starts at one of the floor(0.4 len) (at least 1) real tokens that receive most attention, each equally
    likely, moved back where the block would not fit.

    Args:
        received: (B, L), attention that each token receives, summed over queries and heads; below 0 at padding.
        real: (B, L) bool. lengths: (B,) int64. draws: (B,) int64 in [0, 2**32). threshold: of the rate.
    """
    position = real.cumsum(dim=1) - 1
    dropped = span_length(lengths, threshold)
    candidates = (lengths * 2 // 5).clamp(min=1)
    chosen = (draws * candidates) >> 32
    ranked = received.argsort(dim=1, descending=True, stable=True)
    start = position.gather(1, ranked.gather(1, chosen[:, None]))
    start = start.minimum((lengths - dropped)[:, None]).clamp(min=0)
    inside = (position >= start) & (position < start + dropped[:, None])
    return real & ~inside
