"""Attention with dropped keys in Triton: no mask of (query, key) pairs exists, forward or backward.

Element masks are drawn in the kernels from their counters, and once more in backward; column and span masks are one
flag a key, or with ``gather`` a list of kept keys, which the kernels visit alone (:mod:`.triton_gather`). Kept for
backward: the inputs, the output, one or two log-sums and one flag a query.

The operators are ordinary torch custom operators, so that torch.compile and checkpointing can do with them as with
any other. Steps, samples and keys arrive in tensors: nothing is compiled anew as training goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from ..serialise import choice
from . import triton_gather
from .documents import MOST_POSITIONS, Documents
from .reference import POSITIONS
from .triton_geometry import Geometry, How, Mask, geometry, inside
from .triton_launch import Ready, precision, unable, unwatched, widest_head

HEADS = ("group", "query")
_SETTLED = Ready()


def obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    """Why Triton cannot compute this attention, or ``None`` if it can."""
    missing = unable(query)
    if missing is not None:
        return missing
    head, widest = max(query.shape[-1], value.shape[-1]), widest_head(query)
    if head > widest:
        return f"its heads of {query.dtype} are at most {widest} wide here, not {head}"
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    if sinks is not None:
        return "it has no attention sinks"
    if bias is not None:
        return "it has no additive bias"
    if dropout:
        return f"it has no dropout of torch's on the weights ({dropout})"
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    keys: Tensor | None = None,
    threshold: int = 0,
    keep: Tensor | None = None,
    position: str = "dropkey",
    heads: str = "group",
    causal: bool = False,
    window: int | None = None,
    scaling: float | None = None,
    count: bool | Tensor = False,
    gather: bool | None = None,
    rate: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within documents over a kept set, (B, H, Q, D) -> (B, H, Q, Dv), laid out (B, Q, H, Dv) in memory.

    The kept set of a query: its document's keys that ``causal`` and ``window`` allow and the mask keeps; if there is
    none, its own key (self-attention) or all allowed keys (cross-attention). A query without any allowed key, and
    every query of padding, gives zeros and passes no gradient.

    Args:
        query: (B, H, Q, D). key, value: (B, Hkv, K, D or Dv), H a multiple of Hkv; float16, bfloat16 or float32.
        keys: int64 (branches, 2), site keys; gives the element pattern at ``threshold``. Documents share them evenly.
        threshold: of the rate, 0..65535.
        keep: bool (documents, Hkv or H, columns): the column or span pattern instead, one flag a key, by position.
        position: ``"dropkey"``, or ``"dropattention"``, whose denominator carries no gradient.
        heads: one mask a key/value head (``"group"``) or a query head (``"query"``).
        causal: no key behind the query. window: keys nearer than this many positions, the own one included; both
            ways unless causal.
        scaling: default 1 / sqrt(D).
        count: count the kept pairs, after the rescue; a zero, int64 () on the queries' device, to have it counted in there.
        gather: visit kept keys alone (column and span DropKey), or every key; ``None``: alone where that is possible and
            :func:`.triton_gather.worth_gathering` (in a graph of torch.compile: where that is possible).
        rate: behind ``keep``, the probability of dropping; for that choice alone.

    Returns:
        (out, kept): like ``query`` with Dv; int64 (), the kept pairs of all heads, 0 unless counted.

    Precision: sums in float32. Products of float32 are made of three TF32 products each, which keeps about 21 bits, or of
    one where torch.backends.cuda.matmul allows TF32. Heads are at most 256 wide, of float32 128 (64 below 227 KiB of shared
    memory a block).

    Raises:
        ConfigError: what Triton cannot compute, or shapes, dtypes, devices and settings that disagree.
    """
    if scaling is not None and scaling <= 0:  # kernels multiply maxima by it, too
        query, scaling = query * (-1.0 if scaling < 0 else 0.0), -scaling or 1.0
    query, key, value = (
        rows if not rows.dim() or rows.stride(-1) == 1 else rows.contiguous() for rows in (query, key, value)
    )
    table = documents.table
    asked = (
        query, key, value, documents, keys, threshold, keep, position, heads, causal, window, scaling, gather, rate
    )  # fmt: skip
    if not unwatched(query):
        how = _settle(*asked)
        outputs = attention_forward(
            query, key, value, table, keys if how.threshold else None, keep, *how, count is not False
        )
        return outputs[0], outputs[4]
    place = (
        query.shape, query.stride(), query.dtype, query.device, key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device, table.shape, table.dtype, table.device,
        documents.queries, documents.keys, documents.positions, documents.shifted, documents.cross, documents.full,
        None if keys is None else (keys.shape, keys.dtype, keys.device), threshold,
        None if keep is None else (keep.shape, keep.dtype, keep.device),
        position, heads, causal, window, scaling, count is False, gather, rate, precision(query),
    )  # fmt: skip
    settled: Geometry | None = _SETTLED.get(place)
    if settled is None:
        how = _settle(*asked)
        mask = Mask(table, keys if how.threshold else None, keep)
        settled = _SETTLED.keep(place, geometry(query, key, value, mask, how, count is not False))
    counts = count if isinstance(count, Tensor) else query.new_zeros((), dtype=torch.int64)
    mask = Mask(table, keys if settled.how.threshold else None, keep).contiguous()
    out: Tensor = _Attention.apply(query, key, value, mask, settled, counts)
    return out, counts


def _settle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    keys: Tensor | None,
    threshold: int,
    keep: Tensor | None,
    position: str,
    heads: str,
    causal: bool,
    window: int | None,
    scaling: float | None,
    gather: bool | None,
    rate: float | None,
) -> How:
    """What :func:`attention` was asked for, checked, as the operators take it."""
    _check(query, key, value, documents, keys, threshold, keep)
    choice(position, POSITIONS, "attention position")
    choice(heads, HEADS, "heads")
    if window is not None and window < 1:
        raise ConfigError(f"window must be at least 1, the own key (got {window}); leave it out for no window")
    mask_heads = key.shape[1] if heads == "group" else query.shape[1]
    if keep is not None and keep.shape[1] != mask_heads:
        raise ConfigError(
            f"keep has another number of heads than heads={heads!r} asks for (got {keep.shape[1]}, not {mask_heads}); "
            "draw one mask a key/value head, or say heads='query'"
        )
    reason = triton_gather.obstacle(keep, position, documents.cross, causal, window)
    if gather and reason is not None:
        raise ConfigError(f"kept keys cannot be visited alone: {reason} (got gather=True); leave it out")
    if gather is None:  # a graph is of any length: it may not choose by that
        worth = torch.compiler.is_compiling() or triton_gather.worth_gathering(documents.keys, rate, causal, window)
        gather = reason is None and worth
    drawn = 0 if keys is None else threshold
    return How(
        most_queries=documents.queries,
        most_keys=documents.keys,
        shifted=documents.shifted,
        threshold=drawn,
        mask_heads=mask_heads,
        scaling=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        dropattention=position == "dropattention" and (drawn > 0 or keep is not None),
        causal=causal,
        window=min(window or 0, MOST_POSITIONS),  # kernels add it to places, in 32 bits
        cross=documents.cross,
        gather=gather,
        full=documents.full,
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    keys: Tensor | None,
    threshold: int,
    keep: Tensor | None,
) -> None:
    """A :class:`ConfigError` for anything that a kernel would read wrongly."""
    reason = obstacle(query, key, value)
    if reason is not None:
        raise ConfigError(f"Triton cannot compute this attention: {reason} (got impl='triton'); use impl='auto'")
    shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    four = query.dim() == key.dim() == value.dim() == 4
    if not four or key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ConfigError(
            f"queries, keys and values disagree (got {shapes}); give (B, H, Q, D), (B, Hkv, K, D) and (B, Hkv, K, Dv)"
        )
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        raise ConfigError(f"query heads must be a multiple of key/value heads (got {shapes}); repeat or regroup them")
    if not query.shape[3] or not value.shape[3]:
        raise ConfigError(f"heads have no features (got {shapes}); give a head size of 1 or more")
    table = documents.table
    beside = {"key": key, "value": value, "documents": table, "keys": keys, "keep": keep}
    for name, tensor in beside.items():
        if tensor is not None and tensor.device != query.device:
            raise ConfigError(
                f"{name} must be on the queries' device (got {tensor.device}, not {query.device}); move it"
            )
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ConfigError(
            f"queries, keys and values must have one dtype (got {query.dtype}, {key.dtype}, {value.dtype}); cast them"
        )
    if table.dim() != 2 or table.shape[1] != 8 or table.dtype != torch.int64:
        raise ConfigError(
            f"a table of documents is int64 of shape (documents, 8) (got {table.dtype} of shape {tuple(table.shape)}); "
            "make it with Documents.of_tokens"
        )
    if documents.queries > query.shape[2] or documents.keys > key.shape[2]:
        raise ConfigError(
            f"documents are longer than the batch (got {documents.queries} queries, {documents.keys} keys for {shapes}); "
            "make them from this batch's tokens"
        )
    if not documents.cross and query.shape[2] != key.shape[2]:
        raise ConfigError(
            f"self-attention has as many queries as keys (got {shapes}); pair sides with Documents.across"
        )
    if keys is not None and keep is not None:
        raise ConfigError("a mask is drawn from keys or given by keep (got both); give one of them")
    if keys is not None:
        even = keys.dim() == 2 and keys.shape[1] == 2 and keys.shape[0] and len(table) % keys.shape[0] == 0
        if not even or keys.dtype != torch.int64:
            raise ConfigError(
                f"site keys are int64 of shape (branches, 2) that share the documents evenly (got {keys.dtype} of shape "
                f"{tuple(keys.shape)} for {len(table)} documents); give one key a branch"
            )
        if not 0 <= threshold <= 65535:
            raise ConfigError(f"threshold must lie in 0..65535 (got {threshold}); use a rate below 1")
    if keep is not None:
        fits = keep.dim() == 3 and keep.shape[0] == len(table) and keep.shape[2] >= documents.positions
        if not fits or keep.dtype != torch.bool:
            raise ConfigError(
                f"keep is bool of shape (documents, heads, columns) (got {keep.dtype} of shape {tuple(keep.shape)} for "
                f"{len(table)} documents of up to {documents.positions} positions); draw it in the documents' coordinates"
            )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    keys: Tensor | None,
    keep: Tensor | None,
    most_queries: int,
    most_keys: int,
    shifted: bool,
    threshold: int,
    mask_heads: int,
    scaling: float,
    dropattention: bool,
    causal: bool,
    window: int,
    cross: bool,
    gather: bool,
    full: bool,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Behind :func:`attention`, which checks: (out, log-sums over kept and over allowed keys, rescued rows, kept pairs)."""
    how = How(
        most_queries, most_keys, shifted, threshold, mask_heads, scaling, dropattention, causal, window, cross, gather, full
    )  # fmt: skip
    mask = Mask(table, keys, keep).contiguous()
    counts = query.new_zeros((), dtype=torch.int64)
    made = _run_forward(geometry(query, key, value, mask, how, count), query, key, value, mask, counts)
    out, log_kept, log_allowed, lost, _ = made
    nothing = query.new_empty(0, dtype=torch.float32)
    return (
        out,
        log_kept,
        nothing if log_allowed is None else log_allowed,
        nothing.to(torch.int8) if lost is None else lost,
        counts,
    )


def _run_forward(
    ready: Geometry, query: Tensor, key: Tensor, value: Tensor, mask: Mask, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(out, log-sums over kept and over allowed keys, rescued rows, lists of kept keys); adds kept pairs to ``counts``."""
    how, shape, device = ready.how, query.shape[:3], query.device
    out = torch.empty_strided(ready.out_shape, ready.out_strides, dtype=query.dtype, device=device)
    log_kept = torch.empty(shape, dtype=torch.float32, device=device)
    log_allowed = torch.empty_like(log_kept) if how.dropattention else None
    lost = None
    if ready.masked:
        lost = (torch.empty if ready.written else torch.zeros)(shape, dtype=torch.int8, device=device)
    if not how.full:  # as it is where no document stands
        out.zero_()
        for logs in (log_kept, log_allowed):
            if logs is not None:
                logs.fill_(torch.inf)
    lists = (
        triton_gather.kept_lists(mask.table, mask.keep, how.cross) if ready.gathers and mask.keep is not None else None
    )
    # Tensors that a launch has no use for: any pointer does.
    ready.forward(
        query,
        key,
        value,
        out,
        log_kept,
        log_kept if log_allowed is None else log_allowed,
        log_kept if lost is None else lost,
        counts,
        *mask.pointers(lists),
    )
    return out, log_kept, log_allowed, lost, lists


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_kept: Tensor,
    log_allowed: Tensor,
    lost: Tensor,
    table: Tensor,
    keys: Tensor | None,
    keep: Tensor | None,
    most_queries: int,
    most_keys: int,
    shifted: bool,
    threshold: int,
    mask_heads: int,
    scaling: float,
    dropattention: bool,
    causal: bool,
    window: int,
    cross: bool,
    gather: bool,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    how = How(
        most_queries, most_keys, shifted, threshold, mask_heads, scaling, dropattention, causal, window, cross, gather, full
    )  # fmt: skip
    mask = Mask(table, keys, keep).contiguous()
    ready = geometry(query, key, value, mask, how)
    return _run_backward(ready, mask, gradient, query, key, value, out, log_kept, log_allowed, lost, None)


def _run_backward(
    ready: Geometry,
    mask: Mask,
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_kept: Tensor,
    log_allowed: Tensor | None,
    lost: Tensor | None,
    lists: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    if out.stride() != ready.out_strides:
        out = torch.empty_strided(ready.out_shape, ready.out_strides, dtype=out.dtype, device=out.device).copy_(out)
    if lists is None and ready.gathers and mask.keep is not None:
        lists = triton_gather.kept_lists(mask.table, mask.keep, ready.how.cross)
    full = ready.how.full
    grad_query = _heads_inside(query, query.shape, query.dtype, full)
    dtype = torch.float32 if ready.apart else query.dtype
    grad_key = _heads_inside(key, ready.key_rows, dtype, full)
    grad_value = _heads_inside(value, ready.value_rows, dtype, full)
    deltas = torch.empty_like(log_kept)
    sums = (
        log_kept, log_kept if log_allowed is None else log_allowed, log_kept if lost is None else lost, deltas,
        *mask.pointers(lists),
    )  # fmt: skip
    of_queries, of_keys = ready.backward(gradient)
    of_queries(query, key, value, out, gradient, grad_query, *sums)
    of_keys(query, key, value, gradient, grad_key, grad_value, *sums)
    if ready.apart:
        grad_key, grad_value = (_added_up(rows, key.shape[1], key.dtype) for rows in (grad_key, grad_value))
    return grad_query, grad_key, grad_value


def _heads_inside(like: Tensor, shape: Any, dtype: torch.dtype, full: bool = False) -> Tensor:
    """Zeros (B, H, L, size) that lie (B, L, H, size) in memory, as models want them; ``full``: a kernel writes it all."""
    made = torch.empty_strided(shape, inside(shape), dtype=dtype, device=like.device)
    return made if full else made.zero_()


def _added_up(rows: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Gradients (B, H, L, D) of query heads as those of their key/value heads, (B, groups, L, D)."""
    batch, _, length, size = rows.shape
    sums = rows.transpose(1, 2).reshape(batch, length, groups, -1, size).sum(3)
    return sums.to(dtype).transpose(1, 2)


attention_forward = torch.library.custom_op("hiddenkey_rs::triton_attention", _forward, mutates_args=())
attention_backward = torch.library.custom_op("hiddenkey_rs::triton_attention_backward", _backward, mutates_args=())


@attention_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, keys: Tensor | None, keep: Tensor | None, *rest: Any
) -> Any:
    rows, dropattention, masked = query.shape[:3], rest[6], keys is not None or keep is not None
    return (
        query.new_empty(*rows[:1], rows[2], rows[1], value.shape[3]).transpose(1, 2),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(rows if dropattention else (0,), dtype=torch.float32),
        query.new_empty(rows if masked else (0,), dtype=torch.int8),
        query.new_empty((), dtype=torch.int64),
    )


@attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    return tuple(
        torch.empty_like(rows.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for rows in (query, key, value)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, table, keys, keep, *settings = inputs
    out, log_kept, log_allowed, lost, _ = output
    ctx.save_for_backward(query, key, value, out, log_kept, log_allowed, lost, table, keys, keep)
    ctx.settings = settings[:-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient


def _gradient(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grads = (None,) * 3 if gradient is None else attention_backward(gradient, *ctx.saved_tensors, *ctx.settings)
    return *grads, *(None,) * 16


attention_forward.register_autograd(_gradient, setup_context=_save)


class _Attention(torch.autograd.Function):
    """What the operators do, where nobody watches them: their many arguments alone take the host as long as a kernel does."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Mask, ready: Geometry, counts: Tensor
    ) -> Tensor:
        out, *sums = _run_forward(ready, query, key, value, mask, counts)
        ctx.ready = ready
        ctx.save_for_backward(query, key, value, out, *sums, *mask)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        *states, table, keys, keep = ctx.saved_tensors
        query, key, value, *_ = states
        mask, ready = Mask(table, keys, keep), ctx.ready
        if not ready.fits(query, key, value):  # whoever saves tensors elsewhere may hand them back in another layout
            query, key, value = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (query, key, value))
            mask = mask.contiguous()
            ready = geometry(query, key, value, mask, ready.how)
        return *_run_backward(ready, mask, gradient, query, key, value, *states[3:]), None, None, None
