"""Triton kernels of attention with dropped keys: gradients, with the mask drawn again from its counter.

With g the logits, w the softmax over the allowed keys, S their sum over the kept set K, w' = w / S on K (DropAttention) or
the softmax over K (DropKey), dp_v = grad_out . value_v and delta = sum_u w'_u dp_u = grad_out . out:

    DropKey         dg_v = w'_v (dp_v - delta)      on K, 0 elsewhere
    DropAttention   dg_v = w'_v dp_v - w_v delta    on K, -w_v delta on dropped keys

S carries no gradient. Since w_v = S w'_v on K, one exponential a pair is enough: of g - logsum(K) on K and of g -
logsum(allowed) on the dropped keys, where each is at most 1 and none of the small ones is lost.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, N803

from __future__ import annotations

from .triton_attention_forward import (
    VARYING,
    allowed_tile,
    dot,
    drawn_tile,
    head_flags,
    key_range,
    load_document,
    load_key,
    load_rows,
    scores_of,
    store_rows,
    tile_columns,
)
from .triton_gather_kernel import kept_range
from .triton_philox import jit, tl


@jit
def signed_weights(
    scores, allowed, keep, rows, columns, log_kept, log_allowed, lost,
    PATTERN: tl.constexpr, DROPATTENTION: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Final weights w' of a tile, float32 (rows, columns); DropAttention's dropped pairs hold -w.

    The sign tells the two apart where the logits' gradient is made, so that no flags stay in registers meanwhile.
    """
    kept = allowed
    if PATTERN == 1 or PATTERN == 2:
        rescued = columns[None, :] == rows[:, None] if OWN else lost[:, None]
        kept = allowed & tl.where(lost[:, None], rescued, keep)
    if DROPATTENTION:
        total = tl.where(kept, log_kept[:, None], log_allowed[:, None])
        weights = tl.exp2(tl.where(allowed, scores - total, float("-inf")))
        weights = tl.where(kept, weights, -weights)
    else:
        weights = tl.exp2(tl.where(kept, scores - log_kept[:, None], float("-inf")))
    return weights


@jit
def logit_gradient(weights, products, delta, share, DROPATTENTION: tl.constexpr):
    """Gradient of the logits of a tile from :func:`signed_weights`, ``share`` = S (see above)."""
    if DROPATTENTION:
        gradient = weights * tl.where(weights >= 0, products - (share * delta)[:, None], delta[:, None])
    else:
        gradient = weights * (products - delta[:, None])
    return gradient


@jit
def load_sums(log_kept, log_allowed, lost_rows, place, real, PATTERN: tl.constexpr, DROPATTENTION: tl.constexpr):
    """What the forward pass left of some rows: both log-sums, S, and who was rescued.

    Log-sums are +inf, and so weights zero, where there is no row or it has no key.
    """
    kept = tl.load(log_kept + place, mask=real, other=float("inf"))
    allowed = kept
    share = kept
    if DROPATTENTION:
        allowed = tl.load(log_allowed + place, mask=real, other=float("inf"))
        share = tl.where(kept < float("inf"), tl.exp2(kept - allowed), 0.0)
    lost = kept != kept
    if PATTERN != 0:
        lost = tl.load(lost_rows + place, mask=real, other=0) != 0
    return kept, allowed, share, lost


@jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    query, key, value, out, grad_out, grad_query, grad_value,
    log_kept, log_allowed, lost_rows, deltas, documents, keys, flags,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    out_row, out_head, out_token, grad_out_row, grad_out_head, grad_out_token, grad_row, grad_head, grad_token,
    grad_value_row, grad_value_head, grad_value_token,
    heads, queries, group, mask_group, mask_heads, flag_columns, documents_each, blocks,
    scaling, scale, window, threshold,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PATTERN: tl.constexpr, DROPATTENTION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries; leaves delta of every query for :func:`key_gradient_kernel`, which runs next."""
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    head = (program // blocks) % heads
    number = (program // blocks) // heads
    row, query_start, query_count, key_start, key_count, sample, query_first, key_first = load_document(
        documents, number
    )
    if block * ROWS >= query_count:
        return
    mask_head = head // mask_group
    k0, k1 = load_key(keys, number, documents_each, PATTERN)
    flags = head_flags(flags, number, mask_heads, mask_head, flag_columns, PATTERN)
    index = block * ROWS + tl.arange(0, ROWS)
    rows = query_first + index
    real = index < query_count
    far, near = head.to(tl.int64), (head // group).to(tl.int64)
    query += row * query_row + far * query_head + query_start * query_token
    key += row * key_row + near * key_head + key_start * key_token
    value += row * value_row + near * value_head + key_start * value_token
    out += row * out_row + far * out_head + query_start * out_token
    grad_out += row * grad_out_row + far * grad_out_head + query_start * grad_out_token
    grad_query += row * grad_row + far * grad_head + query_start * grad_token
    q = load_rows(query, query_token, index, query_count, HEAD, BLOCK_D)
    do = load_rows(grad_out, grad_out_token, index, query_count, HEAD_V, BLOCK_V)
    o = load_rows(out, out_token, index, query_count, HEAD_V, BLOCK_V)
    place = (row * heads + head) * queries + query_start + index
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(deltas + place, delta, mask=real)
    kept_log, allowed_log, share, lost = load_sums(
        log_kept, log_allowed, lost_rows, place, real, PATTERN, DROPATTENTION
    )

    low, high = key_first, key_first + key_count
    row_low = query_first + block * ROWS
    row_high = tl.minimum(row_low + ROWS, query_first + query_count)
    start, end = key_range(row_low, row_high, low, high, window, CAUSAL, WINDOW, 1 if PATTERN == 3 else COLUMNS)
    if PATTERN == 3:
        start, end = kept_range(flags, start, end, low, high)
    gradient = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(start, end, COLUMNS):
        columns = tile_columns(first, end, flags, flag_columns, PATTERN, COLUMNS)
        k = load_rows(key, key_token, columns - key_first, key_count, HEAD, BLOCK_D)
        v = load_rows(value, value_token, columns - key_first, key_count, HEAD_V, BLOCK_V)
        scores = scores_of(q, k, ROWS, COLUMNS, PRECISION) * scale
        allowed = allowed_tile(rows, columns, low, high, window, CAUSAL, WINDOW)
        keep = allowed
        if PATTERN == 1 or PATTERN == 2:
            keep = drawn_tile(
                rows, columns, first, mask_head, sample, k0, k1, threshold, flags, flag_columns, PATTERN, ROWS, COLUMNS
            )
        weights = signed_weights(
            scores, allowed, keep, rows, columns, kept_log, allowed_log, lost, PATTERN, DROPATTENTION, OWN
        )
        products = scores_of(do, v, ROWS, COLUMNS, PRECISION)
        inner = logit_gradient(weights, products, delta, share, DROPATTENTION)
        gradient = dot(inner.to(k.dtype), k, gradient, PRECISION)
    store_rows(grad_query, grad_token, index, query_count, gradient * scaling, HEAD, BLOCK_D)
    if PATTERN == 3 and OWN:
        # A rescued row gave its own value, whose key is in no list: its gradient is written here. The mask's first head
        # adds up what all heads under that mask ask for, since they lost the same rows.
        mine = lost & (head % mask_group == 0)
        turns = tl.where(tl.max(mine.to(tl.int32), 0) > 0, mask_group, 0)
        handed = tl.zeros((ROWS, BLOCK_V), tl.float32)
        asked = grad_out
        for _ in range(turns):
            rescued = load_rows(asked, grad_out_token, tl.where(mine, index, -1), query_count, HEAD_V, BLOCK_V)
            handed += rescued.to(tl.float32)
            asked += grad_out_head
        grad_value += row * grad_value_row + mask_head.to(tl.int64) * grad_value_head + key_start * grad_value_token
        store_rows(
            grad_value, grad_value_token, tl.where(mine, rows - key_first, -1), key_count, handed, HEAD_V, BLOCK_V
        )


@jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    query, key, value, grad_out, grad_key, grad_value, log_kept, log_allowed, lost_rows, deltas, documents, keys, flags,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    grad_out_row, grad_out_head, grad_out_token, grad_key_row, grad_key_head, grad_key_token,
    grad_value_row, grad_value_head, grad_value_token,
    heads, queries, group, mask_group, mask_heads, flag_columns, documents_each, blocks,
    scaling, scale, window, threshold,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PATTERN: tl.constexpr, DROPATTENTION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one key/value head, summed over the group's query heads in order.

    Lists of kept keys (pattern 3) are the mask's, so there a program has one mask's tile and query heads: where masks are
    one a query head, gradients are made one a query head. No atomics: the sums are the same in every run.
    """
    program = tl.program_id(0)
    block = program % blocks
    members = mask_group if PATTERN == 3 else group
    owners = heads // members
    owner = (program // blocks) % owners
    number = (program // blocks) // owners
    grouped = owner * members // group
    row, query_start, query_count, key_start, key_count, sample, query_first, key_first = load_document(
        documents, number
    )
    low, high = key_first, key_first + key_count
    first, end = (key_first // COLUMNS + block) * COLUMNS, high
    if PATTERN == 3:
        flags = head_flags(flags, number, mask_heads, owner, flag_columns, PATTERN)
        first, end = block * COLUMNS, tl.load(flags + high)
    if first >= end:
        return
    k0, k1 = load_key(keys, number, documents_each, PATTERN)
    columns = tile_columns(first, end, flags, flag_columns, PATTERN, COLUMNS)
    query += row * query_row + query_start * query_token
    grad_out += row * grad_out_row + query_start * grad_out_token
    near = grouped.to(tl.int64)
    key += row * key_row + near * key_head + key_start * key_token
    value += row * value_row + near * value_head + key_start * value_token
    k = load_rows(key, key_token, columns - key_first, key_count, HEAD, BLOCK_D)
    v = load_rows(value, value_token, columns - key_first, key_count, HEAD_V, BLOCK_V)

    # The queries that can see this tile, as indices into the document.
    from_index, to_index = 0, query_count
    tile_low, tile_high = tl.maximum(first, low), tl.minimum(first + COLUMNS, high)
    if PATTERN == 3:
        tile_low = tl.load(flags + flag_columns + first)
        tile_high = tl.load(flags + flag_columns + tl.minimum(first + COLUMNS, end) - 1) + 1
    if CAUSAL:
        from_index = tl.maximum(from_index, tile_low - query_first)
    if WINDOW:
        to_index = tl.minimum(to_index, tile_high - 1 + window - query_first)
        if not CAUSAL:
            from_index = tl.maximum(from_index, tile_low - window + 1 - query_first)
    from_block = from_index // ROWS
    many = tl.maximum(tl.cdiv(to_index, ROWS) - from_block, 0)
    key_sum = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    value_sum = tl.zeros((COLUMNS, BLOCK_V), tl.float32)
    # One loop over (query head, block), not two: an inner loop of a few blocks would start its loads anew every time.
    for turn in range(many * members):
        head = owner * members + turn // many
        mask_head = head // mask_group
        index = (from_block + turn % many) * ROWS + tl.arange(0, ROWS)
        rows = query_first + index
        real = index < query_count
        far = head.to(tl.int64)
        q = load_rows(query + far * query_head, query_token, index, query_count, HEAD, BLOCK_D)
        do = load_rows(grad_out + far * grad_out_head, grad_out_token, index, query_count, HEAD_V, BLOCK_V)
        place = (row * heads + head) * queries + query_start + index
        delta = tl.load(deltas + place, mask=real, other=0.0)
        kept_log, allowed_log, share, lost = load_sums(
            log_kept, log_allowed, lost_rows, place, real, PATTERN, DROPATTENTION
        )
        scores = scores_of(q, k, ROWS, COLUMNS, PRECISION) * scale
        allowed = allowed_tile(rows, columns, low, high, window, CAUSAL, WINDOW)
        keep = allowed
        if PATTERN == 1 or PATTERN == 2:
            keep = drawn_tile(
                rows,
                columns,
                first,
                mask_head,
                sample,
                k0,
                k1,
                threshold,
                head_flags(flags, number, mask_heads, mask_head, flag_columns, PATTERN),
                flag_columns,
                PATTERN,
                ROWS,
                COLUMNS,
            )
        weights = signed_weights(
            scores, allowed, keep, rows, columns, kept_log, allowed_log, lost, PATTERN, DROPATTENTION, OWN
        )
        final = weights
        if DROPATTENTION:
            final = tl.maximum(weights, 0.0)
        value_sum = dot(tl.trans(final.to(do.dtype)), do, value_sum, PRECISION)
        # Only now, for the registers' sake: with both products at once a head size of 128 spilled.
        products = scores_of(do, v, ROWS, COLUMNS, PRECISION)
        inner = logit_gradient(weights, products, delta, share, DROPATTENTION)
        key_sum = dot(tl.trans(inner.to(q.dtype)), q, key_sum, PRECISION)
    far = owner.to(tl.int64)
    grad_key += row * grad_key_row + far * grad_key_head + key_start * grad_key_token
    grad_value += row * grad_value_row + far * grad_value_head + key_start * grad_value_token
    store_rows(grad_key, grad_key_token, columns - key_first, key_count, key_sum * scaling, HEAD, BLOCK_D)
    store_rows(grad_value, grad_value_token, columns - key_first, key_count, value_sum, HEAD_V, BLOCK_V)
