"""Triton kernels of attention with dropped keys: gradients, with the mask drawn again from its counter.

With g the logits, w the softmax over the allowed keys, S their sum over the kept set K, w' = w / S on K (DropAttention) or
the softmax over K (DropKey), dp_v = grad_out . value_v and delta = sum_u w'_u dp_u = grad_out . out:

    DropKey         dg_v = w'_v (dp_v - delta)      on K, 0 elsewhere
    DropAttention   dg_v = w'_v dp_v - w_v delta    on K, -w_v delta on dropped keys

S carries no gradient. Since w_v = S w'_v on K, one exponential a pair is enough: of g - logsum(K) on K and of g -
logsum(allowed) on the dropped keys, where each is at most 1 and none of the small ones is lost.

A row that lost every key and was given back its own, o, is to the loops one that keeps nothing. What they leave out is added
behind them, row by row: of o the value's gradient, grad_out (w'_o = 1), and for DropAttention the logit's, dp_o = delta.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, N803, N806

from __future__ import annotations

from .triton_attention_forward import (
    VARYING,
    dot,
    head_flags,
    key_range,
    load_block,
    load_document,
    load_key,
    load_rows,
    scores_of,
    store_rows,
    tile_columns,
    tile_pairs,
    whole_end,
)
from .triton_gather_kernel import kept_columns
from .triton_philox import jit, tl


@jit
def signed_weights(
    scores, scale, allowed, keep, log_kept, log_allowed,
    PATTERN: tl.constexpr, DROPATTENTION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Final weights w' of a tile, float32 (rows, columns); DropAttention's dropped pairs hold -w.

    The sign tells the two apart where the logits' gradient is made, so that no flags stay in registers meanwhile.

    Args:
        scores: before scaling. allowed: pairs that attention may use; ``WHOLE``: all of the tile's. keep: the drawn mask.
        log_kept, log_allowed: of the rows, (rows,).
    """
    kept = allowed & keep
    if DROPATTENTION:
        shifted = scores * scale - tl.where(keep, log_kept[:, None], log_allowed[:, None])
        if not WHOLE:
            shifted = tl.where(allowed, shifted, float("-inf"))
        weights = tl.exp2(shifted)
        weights = tl.where(keep, weights, -weights)
    else:
        shifted = scores * scale - log_kept[:, None]
        if not WHOLE or PATTERN == 1 or PATTERN == 2:
            shifted = tl.where(kept, shifted, float("-inf"))
        weights = tl.exp2(shifted)
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
def load_sums(log_kept, log_allowed, place, real, DROPATTENTION: tl.constexpr):
    """What the forward pass left of some rows: both log-sums, and S.

    Log-sums are +inf, and so weights zero, where there is no row, or it has no key or (DropKey) none but its own.
    """
    kept = tl.load(log_kept + place, mask=real, other=float("inf"))
    allowed = kept
    share = kept
    if DROPATTENTION:
        allowed = tl.load(log_allowed + place, mask=real, other=float("inf"))
        share = tl.where(kept < float("inf"), tl.exp2(kept - allowed), 0.0)
    return kept, allowed, share


@jit
def drawn_or_lost(keep, lost_rows, place, real, PATTERN: tl.constexpr, OWN: tl.constexpr):
    """The drawn mask of a tile, and across documents the rows that were given back all their keys."""
    if (PATTERN == 1 or PATTERN == 2) and not OWN:
        keep = keep | (tl.load(lost_rows + place, mask=real, other=0) != 0)[:, None]
    return keep


@jit
def gradient_tiles(
    gradient, start, end, q, do, key, key_token, value, value_token, key_first, key_count, rows, low, high, window, scale,
    kept_log, allowed_log, share, lost_rows, place, real, delta, head, sample, k0, k1, threshold, flags, flag_columns,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PATTERN: tl.constexpr, DROPATTENTION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What tiles of keys from ``start`` to ``end`` add to a block's gradient of queries."""
    for first in range(start, end, COLUMNS):
        columns = tile_columns(first, end, flags, flag_columns, PATTERN, COLUMNS)
        k = load_rows(key, key_token, columns - key_first, key_count, HEAD, BLOCK_D, WHOLE)
        v = load_rows(value, value_token, columns - key_first, key_count, HEAD_V, BLOCK_V, WHOLE)
        scores = scores_of(q, k, ROWS, COLUMNS, PRECISION)
        allowed, keep = tile_pairs(
            rows, columns, first, low, high, window, head, sample, k0, k1, threshold, flags, flag_columns,
            PATTERN, ROWS, COLUMNS, CAUSAL, WINDOW, WHOLE,
        )  # fmt: skip
        keep = drawn_or_lost(keep, lost_rows, place, real, PATTERN, OWN)
        weights = signed_weights(scores, scale, allowed, keep, kept_log, allowed_log, PATTERN, DROPATTENTION, WHOLE)
        products = scores_of(do, v, ROWS, COLUMNS, PRECISION)
        inner = logit_gradient(weights, products, delta, share, DROPATTENTION)
        gradient = dot(inner.to(k.dtype), k, gradient, PRECISION)
    return gradient


@jit(**VARYING)
def query_gradient_kernel(
    query, key, value, out, grad_out, grad_query,
    log_kept, log_allowed, lost_rows, deltas, documents, keys, flags,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    out_row, out_head, out_token, grad_out_row, grad_out_head, grad_out_token, grad_row, grad_head, grad_token,
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
    kept_log, allowed_log, share = load_sums(log_kept, log_allowed, place, real, DROPATTENTION)

    low, high = key_first, key_first + key_count
    row_low = query_first + block * ROWS
    row_high = tl.minimum(row_low + ROWS, query_first + query_count)
    start, end = key_range(row_low, row_high, low, high, window, flags, PATTERN, CAUSAL, WINDOW, COLUMNS)
    gradient = tl.zeros((ROWS, BLOCK_D), tl.float32)
    whole = whole_end(start, end, row_low, low, high, flags, PATTERN, CAUSAL, WINDOW, COLUMNS)
    if not WINDOW:
        gradient = gradient_tiles(
            gradient, start, whole, q, do, key, key_token, value, value_token, key_first, key_count, rows, low, high, window,
            scale, kept_log, allowed_log, share, lost_rows, place, real, delta, mask_head, sample, k0, k1, threshold,
            flags, flag_columns,
            HEAD, HEAD_V, BLOCK_D, BLOCK_V, ROWS, COLUMNS, PATTERN, DROPATTENTION, CAUSAL, WINDOW, OWN, PRECISION, True,
        )  # fmt: skip
    gradient = gradient_tiles(
        gradient, whole, end, q, do, key, key_token, value, value_token, key_first, key_count, rows, low, high, window,
        scale, kept_log, allowed_log, share, lost_rows, place, real, delta, mask_head, sample, k0, k1, threshold,
        flags, flag_columns,
        HEAD, HEAD_V, BLOCK_D, BLOCK_V, ROWS, COLUMNS, PATTERN, DROPATTENTION, CAUSAL, WINDOW, OWN, PRECISION, False,
    )  # fmt: skip
    if DROPATTENTION and OWN:
        lost = tl.load(lost_rows + place, mask=real, other=0) != 0
        for _ in range(tl.max(lost.to(tl.int32), 0)):  # once, or hardly ever
            own = load_rows(key, key_token, tl.where(lost, rows - key_first, -1), key_count, HEAD, BLOCK_D)
            gradient += delta[:, None] * own.to(tl.float32)
    store_rows(grad_query, grad_token, index, query_count, gradient * scaling, HEAD, BLOCK_D)


@jit
def visit_queries(
    key_sum, value_sum, from_block, many, owner, members, k, v, first, columns,
    query, query_head, query_token, grad_out, grad_out_head, grad_out_token,
    log_kept, log_allowed, lost_rows, deltas, row, heads, queries, query_start, query_count, query_first,
    low, high, window, scale, mask_group, mask_heads, number, sample, k0, k1, threshold, flags, flag_columns,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PATTERN: tl.constexpr, DROPATTENTION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What ``many`` blocks of queries of every head of a group add to the gradients of a tile of keys and values."""
    # One loop over (query head, block), not two: an inner loop of a few blocks would start its loads anew every time.
    for turn in range(many * members):
        head = owner * members + turn // many
        mask_head = head // mask_group
        start = (from_block + turn % many) * ROWS
        index = start + tl.arange(0, ROWS)
        rows = query_first + index
        real = index < query_count
        far = head.to(tl.int64)
        q = load_block(query + far * query_head, query_token, start, query_count, ROWS, HEAD, BLOCK_D)
        do = load_block(grad_out + far * grad_out_head, grad_out_token, start, query_count, ROWS, HEAD_V, BLOCK_V)
        place = (row * heads + head) * queries + query_start + index
        delta = tl.load(deltas + place, mask=real, other=0.0)
        kept_log, allowed_log, share = load_sums(log_kept, log_allowed, place, real, DROPATTENTION)
        scores = scores_of(q, k, ROWS, COLUMNS, PRECISION)
        allowed, keep = tile_pairs(
            rows, columns, first, low, high, window, mask_head, sample, k0, k1, threshold,
            head_flags(flags, number, mask_heads, mask_head, flag_columns, PATTERN), flag_columns,
            PATTERN, ROWS, COLUMNS, CAUSAL, WINDOW, WHOLE,
        )  # fmt: skip
        keep = drawn_or_lost(keep, lost_rows, place, real, PATTERN, OWN)
        weights = signed_weights(scores, scale, allowed, keep, kept_log, allowed_log, PATTERN, DROPATTENTION, WHOLE)
        final = weights
        if DROPATTENTION:
            final = tl.maximum(weights, 0.0)
        value_sum = dot(tl.trans(final.to(do.dtype)), do, value_sum, PRECISION)
        # Only now, for the registers' sake: with both products at once a head size of 128 spilled.
        products = scores_of(do, v, ROWS, COLUMNS, PRECISION)
        inner = logit_gradient(weights, products, delta, share, DROPATTENTION)
        key_sum = dot(tl.trans(inner.to(q.dtype)), q, key_sum, PRECISION)
    return key_sum, value_sum


@jit
def add_rescued(
    key_sum, value_sum, columns, owner, members, query, query_head, query_token, grad_out, grad_out_head, grad_out_token,
    lost_rows, deltas, row, heads, queries, query_start, query_count, query_first,
    HEAD: tl.constexpr, HEAD_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, DROPATTENTION: tl.constexpr,
):  # fmt: skip
    """What the rows at a tile's own positions add, where they were given back their own key."""
    index = columns - query_first
    real = (index >= 0) & (index < query_count)
    for member in range(members):
        head = owner * members + member
        place = (row * heads + head) * queries + query_start + index
        lost = tl.load(lost_rows + place, mask=real, other=0) != 0
        far = head.to(tl.int64)
        for _ in range(tl.max(lost.to(tl.int32), 0)):  # once, or hardly ever
            own = tl.where(lost, index, -1)
            asked = load_rows(grad_out + far * grad_out_head, grad_out_token, own, query_count, HEAD_V, BLOCK_V)
            value_sum += asked.to(tl.float32)
            if DROPATTENTION:
                q = load_rows(query + far * query_head, query_token, own, query_count, HEAD, BLOCK_D)
                key_sum += tl.load(deltas + place, mask=lost, other=0.0)[:, None] * q.to(tl.float32)
    return key_sum, value_sum


@jit(**VARYING)
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
    SPAN: tl.constexpr = 128 if PATTERN == 1 else COLUMNS
    first, end = key_first // SPAN * SPAN + block * COLUMNS, high
    # The lowest position of the tile, and one more than its highest.
    tile_low, tile_high = first, first + COLUMNS
    if PATTERN == 3:
        tile_low = low
    if PATTERN == 1 and COLUMNS == 64:
        tile_low = first // 128 * 128 + first // 64 % 2 * 16
        tile_high = tile_low + 112
    if PATTERN == 3:
        flags = head_flags(flags, number, mask_heads, owner, flag_columns, PATTERN)
        first, end = block * COLUMNS, tl.load(flags + high)
    if tile_low >= high or (PATTERN == 3 and first >= key_count):
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
    tile_low, tile_high = tl.maximum(tile_low, low), tl.minimum(tile_high, high)
    if PATTERN == 3:
        tile_low = tl.load(flags + flag_columns + first)
        tile_high = tl.load(flags + flag_columns + tl.minimum(first + COLUMNS, end) - 1) + 1
        to_index = tl.where(first < end, to_index, 0)  # behind the kept keys there is nothing to visit
    if CAUSAL:
        from_index = tl.maximum(from_index, tile_low - query_first)
    if WINDOW:
        to_index = tl.minimum(to_index, tile_high - 1 + window - query_first)
        if not CAUSAL:
            from_index = tl.maximum(from_index, tile_low - window + 1 - query_first)
    from_block = from_index // ROWS
    end_block = tl.maximum(tl.cdiv(to_index, ROWS), from_block)
    # Blocks of queries that see every key of the tile: those behind the diagonal; with a window none.
    whole_block = from_block
    if CAUSAL:
        whole_block = tl.maximum(from_block, tl.cdiv(tl.maximum(tile_high - 1 - query_first, 0), ROWS))
        whole_block = tl.minimum(whole_block, end_block)
    if WINDOW:
        whole_block = end_block
    key_sum = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    value_sum = tl.zeros((COLUMNS, BLOCK_V), tl.float32)
    if CAUSAL or WINDOW:
        key_sum, value_sum = visit_queries(
            key_sum, value_sum, from_block, whole_block - from_block, owner, members, k, v, first, columns,
            query, query_head, query_token, grad_out, grad_out_head, grad_out_token,
            log_kept, log_allowed, lost_rows, deltas, row, heads, queries, query_start, query_count, query_first,
            low, high, window, scale, mask_group, mask_heads, number, sample, k0, k1, threshold, flags, flag_columns,
            HEAD, HEAD_V, BLOCK_D, BLOCK_V, ROWS, COLUMNS, PATTERN, DROPATTENTION, CAUSAL, WINDOW, OWN, PRECISION, False,
        )  # fmt: skip
    if not WINDOW:
        # Keys outside the document are in no tile's way: what is summed up for them is stored nowhere.
        key_sum, value_sum = visit_queries(
            key_sum, value_sum, whole_block, end_block - whole_block, owner, members, k, v, first, columns,
            query, query_head, query_token, grad_out, grad_out_head, grad_out_token,
            log_kept, log_allowed, lost_rows, deltas, row, heads, queries, query_start, query_count, query_first,
            low, high, window, scale, mask_group, mask_heads, number, sample, k0, k1, threshold, flags, flag_columns,
            HEAD, HEAD_V, BLOCK_D, BLOCK_V, ROWS, COLUMNS, PATTERN, DROPATTENTION, CAUSAL, WINDOW, OWN, PRECISION, True,
        )  # fmt: skip
    if PATTERN == 3:
        # Dropped keys stand behind the kept ones: their gradients are zeros, which are written here.
        places = first + tl.arange(0, COLUMNS)
        kept = (places < end)[:, None]
        key_sum, value_sum = tl.where(kept, key_sum, 0.0), tl.where(kept, value_sum, 0.0)
        columns = kept_columns(flags, flag_columns, first, key_count, COLUMNS)
    if PATTERN != 0 and OWN:
        key_sum, value_sum = add_rescued(
            key_sum, value_sum, columns, owner, members, query, query_head, query_token, grad_out, grad_out_head,
            grad_out_token, lost_rows, deltas, row, heads, queries, query_start, query_count, query_first,
            HEAD, HEAD_V, BLOCK_D, BLOCK_V, DROPATTENTION,
        )  # fmt: skip
    far = owner.to(tl.int64)
    grad_key += row * grad_key_row + far * grad_key_head + key_start * grad_key_token
    grad_value += row * grad_value_row + far * grad_value_head + key_start * grad_value_token
    store_rows(grad_key, grad_key_token, columns - key_first, key_count, key_sum * scaling, HEAD, BLOCK_D)
    store_rows(grad_value, grad_value_token, columns - key_first, key_count, value_sum, HEAD_V, BLOCK_V)
