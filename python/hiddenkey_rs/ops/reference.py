"""Attention with dropped keys, as defined: every position, pattern and rule in plain tensor arithmetic.

Masks are boolean throughout, True = may be attended to or is kept, and are combined by AND: adding two "very
negative" numbers overflows, or makes a masked row attend to the future.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

POSITIONS = ("dropkey", "dropattention")


def causal(queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
    """Query q may attend to keys 0..q: bool (1, 1, queries, keys)."""
    query, key = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    return (key <= query)[None, None]


def sliding_window(queries: int, keys: int, window: int, device: torch.device | str = "cpu") -> Tensor:
    """Causal, and no further back than ``window`` keys, the own one included: bool (1, 1, queries, keys)."""
    query, key = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    return ((key <= query) & (key > query - window))[None, None]


def kept_set(allowed: Tensor | None, keep: Tensor, *, rescue: str, queries: int, keys: int) -> Tensor:
    """The pairs that attention may use: allowed and kept, with rows that lost everything rescued.

    Args:
        allowed: bool, broadcastable to (B, H, Q, K); ``None`` allows every pair. Never widened.
        keep: bool (B, H, 1 or Q, K), the drawn mask.
        rescue: what a row whose allowed keys were all dropped keeps: ``"own"``, the key of its own position if that is
            allowed (self-attention), or ``"all"`` allowed keys (cross-attention, and ``"own"`` where it is forbidden).
            ``"none"``: the caller knows that no row lost everything.
        queries, keys: Q and K.

    Returns:
        bool (B, H, Q, K) (or with 1 in place of Q where every row is the same). A row without any allowed key stays
        empty: its output is zero.

    Example:
        >>> kept_set(causal(2, 2), torch.zeros(1, 1, 1, 2, dtype=torch.bool), rescue="own", queries=2, keys=2)[0, 0]
        tensor([[ True, False],
                [False,  True]])
    """
    if allowed is None:
        allowed = keep.new_ones(1, 1, 1, keys)
    kept = allowed & keep
    if rescue == "none":
        return kept
    lost = ~kept.any(dim=-1, keepdim=True)
    # Rows that differ only by their rescue stay one row where none needs it: Q times less to read. On an accelerator
    # the question itself would make the host wait, and in a compiled graph nobody can be asked.
    if (
        not torch.compiler.is_compiling()
        and kept.shape[2] == 1
        and kept.device.type == "cpu"
        and not bool((lost & allowed).any())
    ):
        return kept
    fallback = allowed
    if rescue == "own":
        own = torch.eye(queries, keys, dtype=torch.bool, device=keep.device) & allowed
        fallback = torch.where(own.any(dim=-1, keepdim=True), own, allowed)
    return kept | (lost & fallback)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    allowed: Tensor | None,
    kept: Tensor | None,
    position: str = "dropkey",
    scaling: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over a kept set, (B, H, Q, D) -> (B, H, Q, Dv).

    Args:
        query: (B, H, Q, D). key, value: (B, Hkv, K, D or Dv) with H a multiple of Hkv.
        allowed, kept: bool, broadcastable to (B, H, Q, K), from the model's mask and :func:`kept_set`; ``None`` = all.
        position: ``"dropkey"`` (paper, section 3.1: softmax over the kept keys) or ``"dropattention"`` (softmax over the
            allowed keys, renormalised over the kept ones by a denominator without gradient).
        scaling: default 1 / sqrt(D). bias: added to the scaled logits. softcap: c * tanh(logit / c), before any mask.
        sinks: (H,) logits that join the denominator; they are no keys and are never dropped.
        dropout: torch's own dropout on the final weights (the stock model's).

    Softmax runs in float32 (float64 stays). Rows without an allowed key give zeros and pass no gradient.
    """
    weights = attention_weights(
        query,
        key,
        allowed=allowed,
        kept=kept,
        position=position,
        scaling=scaling,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
    ).to(query.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ repeat_heads(value, query.shape[1])


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    allowed: Tensor | None,
    kept: Tensor | None,
    position: str = "dropkey",
    scaling: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The weights that :func:`attention` multiplies values with: (B, H, Q, K), float32 or float64, zero where dropped."""
    logits = (
        query
        @ repeat_heads(key, query.shape[1]).transpose(-1, -2)
        * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    )
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    everything = logits.new_ones((1, 1, 1, 1), dtype=torch.bool)
    allowed = everything if allowed is None else allowed
    kept = allowed if kept is None else kept
    if position == "dropkey":
        return _exp_over(logits, kept, sinks, kept)
    # w'_u = w_u / NoGrad(S) in logarithms, so that it is exact where the kept weights are too small to add up.
    log_weights = logits - _log_total(logits, allowed, sinks)
    log_kept = _log_total(log_weights, kept, None if sinks is None else _log_sink(logits, allowed, sinks)).detach()
    return _exp_on(log_weights - log_kept, kept)


def _exp_over(logits: Tensor, kept: Tensor, sinks: Tensor | None, where: Tensor) -> Tensor:
    return _exp_on(logits - _log_total(logits, kept, sinks), where)


def _exp_on(log_weights: Tensor, kept: Tensor) -> Tensor:
    # Filled before exp, so that neither the value nor the gradient of a dropped place can be infinite.
    return log_weights.masked_fill(~kept, -torch.inf).exp()


def _log_total(logits: Tensor, kept: Tensor, sinks: Tensor | None) -> Tensor:
    """Logarithm of the sum of exponentials over the kept set (and the sink): (B, H, Q, 1), 0 where the set is empty."""
    masked = logits.masked_fill(~kept, -torch.inf)
    if sinks is not None:
        column = sinks if sinks.dim() == 4 else sinks.to(logits.dtype)[None, :, None, None]
        masked = torch.cat((masked, column.expand(*masked.shape[:-1], 1)), dim=-1)
        return masked.logsumexp(dim=-1, keepdim=True)
    empty = ~kept.any(dim=-1, keepdim=True)
    # logsumexp of nothing is -inf and its gradient NaN: such a row sums a constant instead.
    return masked.masked_fill(empty, 0.0).logsumexp(dim=-1, keepdim=True)


def _log_sink(logits: Tensor, allowed: Tensor, sinks: Tensor) -> Tensor:
    """The sink's own log weight after softmax over the allowed keys: (B, H, Q, 1)."""
    return sinks.to(logits.dtype)[None, :, None, None] - _log_total(logits, allowed, sinks)


def repeat_heads(grouped: Tensor, heads: int) -> Tensor:
    """Key/value heads (axis 1) repeated to ``heads`` query heads."""
    repeats = heads // grouped.shape[1]
    return grouped if repeats == 1 else grouped.repeat_interleave(repeats, dim=1)
