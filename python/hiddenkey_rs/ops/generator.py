"""Stream hk1 in torch, on int64 arithmetic: the same bits as the Rust core, on any device.

Masks that are needed on an accelerator are drawn there, so that nothing but the sample ids crosses the bus.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ELEMENT, _COLUMN, _SPAN = 0, 1, 2
_TILE = 128

Key = tuple[int, int] | Tensor
Word = Tensor | int


def _mul(word: Word, constant: int) -> tuple[Word, Word]:
    """High and low 32 bits of a product. Split in 16-bit halves: a full product would overflow int64's sign."""
    low = (word & 0xFFFF) * constant
    high = (word >> 16) * constant + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(c0: Word, c1: Word, c2: Word, c3: Word, key: Key) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 of broadcastable int64 tensors (or ints) that hold 32-bit words; the output words likewise."""
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mul(c0, _M0)
        high1, low1 = _mul(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def derive_key(seed: int, step: int, branch: int, layer: int, site: int) -> Key:
    """The site's Philox key: a four-round Feistel network over (step, layer | site | branch) under the seed."""
    left, right = step, layer | site << 10 | branch << 16
    for r in range(4):
        left, right = right, left ^ int(philox(right, r, 0, _MASK, (seed & _MASK, seed >> 32))[0])
    return left, right


def element_keep(key: Key, samples: Tensor, rows: int, columns: int, threshold: int, heads: int = 1) -> Tensor:
    """Element mask, bool (B, heads, rows, columns), True = keep. ``samples``: (B,) int64, on the target device."""
    return _grid(key, samples, rows, columns, threshold, heads, _ELEMENT)


def column_keep(key: Key, samples: Tensor, columns: int, threshold: int, heads: int = 1) -> Tensor:
    """Column mask, bool (B, heads, 1, columns)."""
    return _grid(key, samples, 1, columns, threshold, heads, _COLUMN)


def row_keep(key: Key, samples: Tensor, positions: Tensor, columns: int, threshold: int) -> Tensor:
    """Rows of element masks, one for each (sample, position), head 0: bool (N, columns); False where a sample is -1."""
    row = torch.where(samples < 0, 0, positions)[:, None]
    c2, c3 = _sample_words(samples.clamp(min=0)[:, None], _ELEMENT)
    return (
        _lay(philox(row, _blocks(columns, samples.device), c2, c3, key), columns, threshold) & (samples >= 0)[:, None]
    )


def span_keep(key: Key, samples: Tensor, lengths: Tensor, columns: int, threshold: int, heads: int = 1) -> Tensor:
    """Span mask, bool (B, heads, 1, columns). ``lengths``: (B,) int64; columns past a length are False."""
    head = torch.arange(heads, device=samples.device)[None, :]
    draw = philox(head << 20, 0, *_sample_words(samples[:, None], _SPAN), key)[0]
    length = lengths[:, None]
    dropped = span_length(length, threshold)
    start = (draw * (length - dropped + 1)) >> 32
    column = torch.arange(columns, device=samples.device)
    inside = (column >= start[..., None]) & (column < (start + dropped)[..., None])
    return (~inside & (column < length[..., None]))[:, :, None]


def span_length(lengths: Tensor, threshold: int) -> Tensor:
    """How many columns a span drops of each length."""
    if threshold == 0:
        return torch.zeros_like(lengths)
    return torch.minimum(((threshold * lengths + 32768) >> 16).clamp(min=1), lengths)


def span_draw(key: Key, sample: int) -> int:
    """The 32-bit draw of one example's span (head 0)."""
    return int(philox(0, 0, sample & _MASK, sample >> 32 | _SPAN << 30, key)[0])


def _sample_words(samples: Tensor, pattern: int) -> tuple[Tensor, Tensor]:
    return samples & _MASK, (samples >> 32) | pattern << 30


def _blocks(columns: int, device: torch.device) -> Tensor:
    """The counters of a row's tiles: 16 a tile."""
    return torch.arange(16 * -(-columns // _TILE), device=device)


def _lay(outputs: tuple[Word, ...], columns: int, threshold: int) -> Tensor:
    """Output words of shape (..., counters) to the decisions of a row, bool (..., columns)."""
    words = torch.stack(torch.broadcast_tensors(*outputs), dim=-1)
    # (..., tile, counter, word) -> column = 128 tile + 32 word + 2 counter + half
    words = words.unflatten(-2, (-1, 16)).transpose(-1, -2)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return (halves >= threshold).flatten(-4)[..., :columns]


def _grid(key: Key, samples: Tensor, rows: int, columns: int, threshold: int, heads: int, pattern: int) -> Tensor:
    device = samples.device
    if not columns or not samples.numel():
        return torch.ones(len(samples), heads, rows, columns, dtype=torch.bool, device=device)
    row = torch.arange(rows, device=device)[:, None] | (torch.arange(heads, device=device) << 20)[:, None, None]
    c2, c3 = _sample_words(samples[:, None, None, None], pattern)
    return _lay(philox(row[None], _blocks(columns, device), c2, c3, key), columns, threshold)
