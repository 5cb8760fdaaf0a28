"""Chooses who computes an attention. An explicit choice never falls back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from ..serialise import choice
from . import blocked, compact, cpu_kernel, reference, sdpa

IMPLEMENTATIONS = ("auto", "reference", "sdpa", "compact", "blocked", "triton")

BLOCKED_QUERIES = 192
"""From so many queries on, a mask that differs by query is applied a block of them at a time; below, blocks are too small."""
GATHER_COST = 40
"""Gathering costs what attention to so many keys costs each query: measured, ``hiddenkey bench attention`` shows it."""


def dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    allowed: Tensor | None,
    keep: Tensor,
    rescue: str,
    rate: float,
    position: str = "dropkey",
    scaling: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention under a drawn mask: the output (B, H, Q, D), and how many pairs were dropped and allowed, int64 ().

    Args:
        query, key, value, allowed, position, scaling, bias, softcap, sinks, dropout: as :func:`attention`.
        keep: bool (B, H or Hkv, 1 or Q, K), the drawn mask. rescue: what a query that lost all its keys attends to, as
            :func:`kept_set`: ``"own"`` (its own key), ``"all"`` (what it may) or ``"none"``.
        rate: the probability of dropping, for the choice between gathering kept keys and masking dropped ones.
        impl: as :func:`attention`, and ``"compact"``: kept keys are gathered (CPU, whole columns, bidirectional), and
            ``"blocked"``: a block of queries at a time (CPU, masks that differ by query). ``"auto"`` gathers where the keys that
            go are worth it (:func:`worth_gathering`), and takes blocks from :data:`BLOCKED_QUERIES` queries on.

    Raises:
        ConfigError: an unknown ``impl`` or position, or an explicit ``impl`` that cannot compute this.

    Example:
        >>> import torch
        >>> q = torch.randn(2, 4, 5, 8)
        >>> keep = torch.arange(5).ne(2).expand(2, 4, 1, 5)  # column 2 goes
        >>> out, dropped, total = dropped_attention(q, q, q, allowed=None, keep=keep, rescue="own", rate=0.2)
        >>> out.shape, int(dropped), int(total)
        (torch.Size([2, 4, 5, 8]), 40, 200)
    """
    choice(impl, IMPLEMENTATIONS, "impl")
    _refuse_kernels(impl)
    shape = (*query.shape[:3], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    no_sdpa = sdpa.obstacle(position, bias, softcap, sinks)
    path = _path(impl, _kernel_obstacle(query, value, scale, dropout) or no_sdpa, allowed, keep, shape, rate, rescue)
    if path == "compact":
        return _gathered(query, key, value, allowed, keep, rescue, scale)
    keep = reference.repeat_heads(keep, query.shape[1])
    if path == "blocked":
        return _in_blocks(query, key, value, allowed, keep, rescue, scale)
    by_sdpa = impl in ("auto", "sdpa") and not dropout and no_sdpa is None
    # Where nobody can be asked whether a query lost all its keys, a kept set has a row for each of them.
    unasked = torch.compiler.is_compiling() or keep.device.type != "cpu"
    rescued = rescue == "all" or (rescue == "own" and shape[2] == shape[3])
    if by_sdpa and unasked and rescued and _alike(allowed, keep):
        return _in_one_row(query, key, value, allowed, keep, rescue, scaling)
    kept = reference.kept_set(allowed, keep, rescue=rescue, queries=shape[2], keys=shape[3])
    output = attention(
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
        impl=impl,
    )
    total = (
        count_pairs(allowed, shape) if allowed is not None else query.new_full((), math.prod(shape), dtype=torch.int64)
    )
    return output, total - count_pairs(kept, shape), total


def _path(
    impl: str,
    obstacle: str | None,
    allowed: Tensor | None,
    keep: Tensor,
    shape: tuple[int, ...],
    rate: float,
    rescue: str,
) -> str:
    """``"compact"``, ``"blocked"`` or ``"masked"``: how to compute attention under a drawn mask.

    Args:
        impl: as asked for. obstacle: why neither of the first two can compute it, whatever the mask.
        shape: (B, H, Q, K). rate: the probability of dropping. rescue: of queries that lost all keys.
    """
    alike = _alike(allowed, keep)
    owned = rescue != "own" or shape[2] == shape[3]  # every query has a key of its own to fall back on, or needs none
    shared = allowed is None or allowed.shape[1] == 1  # by all heads
    if impl in ("compact", "blocked"):
        if impl == "compact" and not alike:
            obstacle = obstacle or "queries of a head see different keys"
        if impl == "compact" and not owned:
            obstacle = obstacle or f"rescue='own' asks for as many queries as keys, not {shape[2]} and {shape[3]}"
        if impl == "blocked" and not shared:
            obstacle = obstacle or "heads are allowed different keys"
        if obstacle is not None:
            raise ConfigError(
                f"this path cannot compute the attention: {obstacle} (got impl={impl!r}); use impl='auto'"
            )
        return impl
    if impl != "auto" or obstacle is not None:
        return "masked"
    if alike:
        return "compact" if owned and worth_gathering(shape[2], shape[3], rate) else "masked"
    return "blocked" if shared and shape[2] >= BLOCKED_QUERIES else "masked"


def _alike(allowed: Tensor | None, keep: Tensor) -> bool:
    """Whether all queries of a head see the same keys."""
    return keep.shape[2] == 1 and (allowed is None or allowed.shape[1:3] == (1, 1))


def worth_gathering(queries: int, keys: int, rate: float) -> bool:
    """Whether gathering kept keys is faster than masking dropped ones: the keys that go, against what moving the rest costs.

    An example's heads share one number of places, the most that any of them keeps, so fewer leave than are dropped.
    """
    most = keys * (1 - rate) + 1.6 * math.sqrt(keys * rate * (1 - rate))
    places = min(-(-most // compact.PLACES) * compact.PLACES, keys)
    return (1 - places / max(keys, 1)) * queries >= GATHER_COST


def _refuse_kernels(impl: str) -> None:
    if impl == "triton":
        raise ConfigError(
            "Triton's kernels take documents, not masks (got impl='triton'); use hiddenkey_rs.attach(..., impl='triton'), "
            "or call ops.triton_attention.attention"
        )


def _kernel_obstacle(query: Tensor, value: Tensor, scaling: float, dropout: float) -> str | None:
    """Why torch's CPU kernel cannot be called on parts of this attention, or ``None`` if it can."""
    if not cpu_kernel.runs_on(query):
        return f"it runs on the CPU in float32, bfloat16 and float16, not in {query.dtype} on {query.device.type}"
    if value.shape[-1] != query.shape[-1]:
        return f"values are {value.shape[-1]} wide, queries and keys {query.shape[-1]}"
    if not scaling > 0:  # the kernel scales what it has forbidden already
        return f"logits are scaled by {scaling}, which is not positive"
    return f"the stock model's attention dropout draws on weights (rate {dropout})" if dropout else None


def _fits_blocks(query: Tensor, value: Tensor, kept: Tensor, scaling: float, dropout: float) -> bool:
    """Whether blocks of queries are the way for a kept set: it is the same for all heads, and differs by query."""
    long = kept.shape[1] == 1 < kept.shape[2] and query.shape[2] >= BLOCKED_QUERIES
    return long and _kernel_obstacle(query, value, scaling, dropout) is None


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, keep: Tensor, rescue: str, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, heads, queries, _ = query.shape
    keys = key.shape[2]
    allowed = keep.new_ones(1, 1, queries, keys) if allowed is None else allowed.expand(-1, 1, queries, keys)
    key, value = reference.repeat_heads(key, heads), reference.repeat_heads(value, heads)
    output, kept, total = blocked.attention(query, key, value, allowed, keep, rescue, scaling)
    return output, total - kept, total


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    keep: Tensor,
    rescue: str,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, queries, _ = query.shape
    heads, keys = keep.shape[1], key.shape[2]
    if heads != key.shape[1]:  # one mask a query head
        key, value = reference.repeat_heads(key, heads), reference.repeat_heads(value, heads)
    groups = query.shape[1] // heads
    real = keep.new_ones(batch, keys) if allowed is None else allowed[:, 0, 0].expand(batch, keys)
    stays = keep[:, :, 0].expand(batch, heads, keys) & real[:, None]
    lost = ~stays.any(dim=-1)
    if rescue == "all":
        stays = stays | (lost[..., None] & real[:, None])
    output = compact.attention(query, key, value, stays, real, scaling)
    total = real.count_nonzero() * (heads * queries)
    kept = stays.count_nonzero() * queries
    if rescue == "own":
        kept = kept + (lost.sum(dim=-1) * _own_pairs(real.sum(dim=-1), queries)).sum()
    return output, groups * (total - kept), groups * total


def _in_one_row(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, keep: Tensor, rescue: str, scaling: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Through SDPA under one row of keys for all queries of a head; heads that lost theirs are put right afterwards."""
    heads, queries = query.shape[1:3]
    real = keep.new_ones(len(query), 1, 1, key.shape[2]) if allowed is None else allowed
    kept = real & keep
    lost = ~kept.any(dim=-1, keepdim=True)
    output = sdpa.attention(query, key, value, kept=kept | (lost & real), scaling=scaling)
    length = real.sum(dim=-1)
    rescued = length * queries
    if rescue == "own":  # padding has seen all allowed keys, as it should
        output = torch.where(lost & real.mT, reference.repeat_heads(value, heads), output)
        rescued = _own_pairs(length, queries)
    pairs = torch.where(lost[..., 0], rescued, kept.sum(dim=-1) * queries)
    shape = (len(query), heads, queries, key.shape[2])
    total = count_pairs(real, shape)
    return output, total - pairs.expand(*shape[:2], 1).sum(), total


def _own_pairs(length: Tensor, queries: int) -> Tensor:
    """Pairs of a head that lost its keys: each of ``length`` real queries keeps its own key, one of padding all allowed ones."""
    return length + (queries - length) * length


def count_pairs(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """How many pairs of the full ``shape`` a broadcastable mask marks (0-dim int64; nothing waits for a device)."""
    repeats = 1
    for have, want in zip(mask.shape, shape, strict=True):
        repeats *= want // have if have else 1
    return mask.count_nonzero() * repeats


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
    """Attention over a kept set, (B, H, Q, D) -> (B, H, Q, Dv). Rows without an allowed key give zeros and pass no gradient.

    Args:
        query: (B, H, Q, D). key, value: (B, Hkv, K, D or Dv) with H a multiple of Hkv; any float dtype.
        allowed: bool, broadcastable to (B, H, Q, K), what may be attended to; ``None``: everything. kept: what is left of
            it (:func:`kept_set`); ``None``: all.
        position: ``"dropkey"`` (paper, section 3.1: softmax over the kept keys) or ``"dropattention"`` (softmax over the
            allowed keys, renormalised over the kept ones by a denominator without gradient).
        scaling: of the logits, default 1 / sqrt(D). bias: added to the scaled logits. softcap: c * tanh(logit / c), before
            any mask. sinks: (H,) logits that join the denominator; they are no keys and are never dropped.
        dropout: torch's own dropout on the final weights (the stock model's), in [0, 1).
        impl: ``"reference"``, ``"sdpa"`` (DropKey without bias, soft-capping and sinks) or ``"auto"``, which takes SDPA
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
    _refuse_kernels(impl)
    choice(position, reference.POSITIONS, "attention position")
    obstacle = sdpa.obstacle(position, bias, softcap, sinks)
    if impl == "sdpa" and obstacle is not None:
        raise ConfigError(f"SDPA cannot compute this attention: {obstacle} (got impl='sdpa'); use impl='auto'")
    if impl in ("compact", "blocked"):
        raise ConfigError(f"this path takes a drawn mask, not a kept set (got impl={impl!r}); call dropped_attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kept = allowed if kept is None else kept
    if impl == "auto" and obstacle is None and kept is not None and _fits_blocks(query, value, kept, scale, dropout):
        everything = kept.new_ones(1, 1, 1, kept.shape[3])
        return _in_blocks(query, key, value, kept, everything, "all", scale)[0]
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
