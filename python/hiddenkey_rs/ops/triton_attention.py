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
from .triton_launch import Launch, kernels, strides, unable, unwatched, widest_head

HEADS = ("group", "query")
_LOG2E = 1.4426950408889634


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
    count: bool = False,
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
        count: count the kept pairs, after the rescue.
        gather: visit kept keys alone (column and span DropKey), or every key; ``None``: alone where that is possible and
            :func:`.triton_gather.worth_gathering`.
        rate: behind ``keep``, the probability of dropping; for that choice alone.

    Returns:
        (out, kept): like ``query`` with Dv; int64 (), the kept pairs of all heads, 0 unless counted.

    Precision: sums in float32. Products of float32 are made of three TF32 products each, which keeps about 21 bits, or of
    one where torch.backends.cuda.matmul allows TF32. Heads are at most 256 wide, of float32 128 (64 below 227 KiB of shared
    memory a block).

    Raises:
        ConfigError: what Triton cannot compute, or shapes, dtypes, devices and settings that disagree.
    """
    _check(query, key, value, documents, keys, threshold, keep)
    choice(position, POSITIONS, "attention position")
    choice(heads, HEADS, "heads")
    if window is not None and window < 1:
        raise ConfigError(f"window must be at least 1, the own key (got {window}); leave it out for no window")
    window = None if window is None else min(window, MOST_POSITIONS)  # kernels add it to places, in 32 bits
    mask_heads = key.shape[1] if heads == "group" else query.shape[1]
    if keep is not None and keep.shape[1] != mask_heads:
        raise ConfigError(
            f"keep has another number of heads than heads={heads!r} asks for (got {keep.shape[1]}, not {mask_heads}); "
            "draw one mask a key/value head, or say heads='query'"
        )
    if keys is not None and threshold == 0:
        keys = None
    reason = triton_gather.obstacle(keep, position, documents.cross, causal, window)
    if gather and reason is not None:
        raise ConfigError(f"kept keys cannot be visited alone: {reason} (got gather=True); leave it out")
    if gather is None:
        gather = reason is None and triton_gather.worth_gathering(documents.keys, rate, causal, window)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if scaling <= 0:  # kernels multiply maxima by it, too
        query, scaling = query * (-1.0 if scaling < 0 else 0.0), -scaling or 1.0
    attend = _Attention.apply if unwatched(query) else attention_forward
    outputs = attend(
        *(rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (query, key, value)),
        documents.table,
        keys,
        keep,
        documents.queries,
        documents.keys,
        documents.shifted,
        threshold,
        mask_heads,
        scaling,
        position == "dropattention" and not (keys is None and keep is None),
        causal,
        window or 0,
        documents.cross,
        gather,
        documents.full,
        count,
    )
    return outputs[0], outputs[4]


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
    # A list's kernels write no flags across documents, where no row is lost.
    written = full and not (gather and cross)
    outputs = _outputs(query, value, keys is not None or keep is not None, dropattention, full, written)
    out, log_kept, log_allowed, lost, counts = outputs
    lists = triton_gather.kept_lists(table, keep, cross) if gather and keep is not None else None
    launch = Launch("forward", query, key, value, table, keys, keep, most_queries, mask_heads, causal, lists=lists)
    if launch.programs:
        with launch.device:
            kernels("attention_forward").forward_kernel[(launch.programs,)](
                query, key, value, out, log_kept, log_allowed, lost, counts, *launch.tensors,
                *strides(query, key, value, out), *launch.numbers,
                scaling * _LOG2E, window, threshold,
                **launch.constants, DROPATTENTION=dropattention, CAUSAL=causal, WINDOW=window > 0, OWN=not cross,
                COUNT=count,
            )  # fmt: skip
    return outputs


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
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    grad_query = _heads_inside(query, query.shape[-1], full=full)
    lists = triton_gather.kept_lists(table, keep, cross) if gather and keep is not None else None
    # A list is one query head's or one key/value head's. The former's gradients of keys are added up afterwards.
    apart = lists is not None and mask_heads != key.shape[1]
    heads, dtype = (mask_heads, torch.float32) if apart else (None, None)
    grad_key, grad_value = (_heads_inside(rows, rows.shape[-1], heads, dtype, full) for rows in (key, value))
    deltas = torch.empty_like(log_kept)
    flags = {"DROPATTENTION": dropattention, "CAUSAL": causal, "WINDOW": window > 0, "OWN": not cross}
    sums = (log_kept, log_allowed, lost, deltas)
    settings = (scaling, scaling * _LOG2E, window, threshold)
    backward = kernels("attention_backward")
    launch = Launch("query", query, key, value, table, keys, keep, most_queries, mask_heads, causal, lists=lists)
    if launch.programs:
        with launch.device:
            backward.query_gradient_kernel[(launch.programs,)](
                query, key, value, out, gradient, grad_query, *sums, *launch.tensors,
                *strides(query, key, value, out, gradient, grad_query), *launch.numbers, *settings,
                **launch.constants, **flags,
            )  # fmt: skip
    launch = Launch("key", query, key, value, table, keys, keep, most_keys, mask_heads, causal, shifted, lists)
    if launch.programs:
        with launch.device:
            backward.key_gradient_kernel[(launch.programs,)](
                query, key, value, gradient, grad_key, grad_value, *sums, *launch.tensors,
                *strides(query, key, value, gradient, grad_key, grad_value), *launch.numbers, *settings,
                **launch.constants, **flags,
            )  # fmt: skip
    if apart:
        grad_key, grad_value = (_added_up(rows, key.shape[1], key.dtype) for rows in (grad_key, grad_value))
    return grad_query, grad_key, grad_value


def _outputs(
    query: Tensor, value: Tensor, masked: bool, dropattention: bool, full: bool, written: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what :func:`attention_forward` returns, as it is where no document stands.

    Args:
        full: documents stand everywhere. written: the kernel writes the flags of every row.
    """
    rows = query.shape[:3]
    some: Any = rows if dropattention else (0,)

    def logs(shape: Any) -> Tensor:
        empty = query.new_empty(shape, dtype=torch.float32)
        return empty if full else empty.fill_(torch.inf)

    return (
        _heads_inside(query, value.shape[-1], full=full),
        logs(rows),
        logs(some),
        (query.new_empty if written else query.new_zeros)(rows if masked else (0,), dtype=torch.int8),
        query.new_zeros((), dtype=torch.int64),
    )


def _heads_inside(
    rows: Tensor, size: int, heads: int | None = None, dtype: torch.dtype | None = None, full: bool = False
) -> Tensor:
    """Zeros (B, H, L, size) that lie (B, L, H, size) in memory, as models want them; ``full``: a kernel writes it all."""
    batch, own, length, _ = rows.shape
    made = rows.new_empty if full else rows.new_zeros
    return made((batch, length, heads or own, size), dtype=dtype).transpose(1, 2)


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
    return _outputs(query, value, keys is not None or keep is not None, rest[6], False, False)


@attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    return tuple(_heads_inside(rows, rows.shape[-1]) for rows in (query, key, value))


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
    """What the operators do, where nobody watches them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor | None, *_: Any) -> Any:
        grads = (None,) * 3 if gradient is None else _backward(gradient, *ctx.saved_tensors, *ctx.settings)
        return *grads, *(None,) * 16
