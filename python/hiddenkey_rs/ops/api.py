"""Chooses who computes an attention. An explicit choice never falls back."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from ..serialise import choice
from . import reference, sdpa

IMPLEMENTATIONS = ("auto", "reference", "sdpa")


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
    impl: str = "auto",
) -> Tensor:
    """Attention over a kept set, (B, H, Q, D) -> (B, H, Q, Dv); arguments as :func:`.reference.attention`.

    ``impl``: ``"reference"``, ``"sdpa"`` (DropKey without bias, soft-capping and sinks) or ``"auto"``, which takes SDPA
    wherever it can.

    Raises:
        ConfigError: an unknown ``impl`` or position, or ``impl="sdpa"`` for what SDPA cannot do.

    Example:
        >>> import torch
        >>> q = torch.randn(2, 4, 5, 8)
        >>> k = torch.randn(2, 2, 5, 8)
        >>> keep = torch.rand(2, 4, 1, 5) > 0.1
        >>> kept = reference.kept_set(None, keep, rescue="own", queries=5, keys=5)
        >>> attention(q, k, k, allowed=None, kept=kept).shape
        torch.Size([2, 4, 5, 8])
    """
    choice(impl, IMPLEMENTATIONS, "impl")
    choice(position, reference.POSITIONS, "attention position")
    obstacle = sdpa.obstacle(position, bias, softcap, sinks)
    if impl == "sdpa" and obstacle is not None:
        raise ConfigError(f"SDPA cannot compute this attention: {obstacle} (got impl='sdpa'); use impl='auto'")
    if impl != "reference" and obstacle is None:
        return sdpa.attention(query, key, value, kept=kept, scaling=scaling, dropout=dropout)
    return reference.attention(
        query,
        key,
        value,
        allowed=allowed,
        kept=kept,
        position=position,
        scaling=scaling,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
    )
