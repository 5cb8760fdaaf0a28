"""Attention by the definition: float64, one row at a time, sums over Python lists of keys."""

from __future__ import annotations

import math

import numpy as np


def row_weights(
    logits: np.ndarray, allowed: np.ndarray, keep: np.ndarray, own: int | None, position: str, sink: float | None
) -> np.ndarray:
    """Weights of one query over its keys. ``own``: index of the key to rescue a row with, ``None`` = all allowed ones."""
    keys = [int(k) for k in np.flatnonzero(allowed)]
    kept = [k for k in keys if keep[k]]
    weights = np.zeros(len(logits))
    if not keys:
        return weights
    if not kept:
        kept = [own] if own is not None and own in keys else keys
    base = kept if position == "dropkey" else keys
    top = max([logits[k] for k in base] + ([] if sink is None else [sink]))
    mass = {k: math.exp(logits[k] - top) for k in base}
    extra = 0.0 if sink is None else math.exp(sink - top)
    if position == "dropkey":
        total = sum(mass.values()) + extra
        for k in kept:
            weights[k] = mass[k] / total
        return weights
    total = sum(mass.values()) + extra
    w = {k: mass[k] / total for k in keys}
    s = sum(w[k] for k in kept) + extra / total
    for k in kept:
        weights[k] = w[k] / s
    return weights


def attention(query, key, value, allowed, keep, *, rescue, position, scaling, bias=None, softcap=None, sinks=None):
    """(B, H, Q, D) arrays; ``allowed`` and ``keep`` of shape (B, H, Q, K); grouped key/value heads."""
    batch, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    output = np.zeros((batch, heads, queries, value.shape[-1]))
    for b, h, q in np.ndindex(batch, heads, queries):
        logits = key[b, h // groups] @ query[b, h, q] * scaling
        if bias is not None:
            logits = logits + bias[b, h, q]
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        own = q if rescue == "own" else None
        sink = None if sinks is None else float(sinks[h])
        weights = row_weights(logits, allowed[b, h, q], keep[b, h, q], own, position, sink)
        output[b, h, q] = weights @ value[b, h // groups]
    return output
