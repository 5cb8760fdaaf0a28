"""The stream's order in a Triton tile: 32 consecutive columns an output word, pairs of columns a thread, no shuffles.

A prototype of what an attention kernel needs, forward and backward: the keep mask of a (rows, 128 columns) tile from
nothing but the key and the counter. Runs in Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

KERNEL = """
import torch, triton, triton.language as tl
from hiddenkey_rs import MaskKey, masks, ops

@triton.jit
def mulhilo(a, b):
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), (product & 0xFFFFFFFF).to(tl.uint32)

@triton.jit
def element_tile(
    out, k0, k1, sample_low, sample_high, head, threshold, row_start, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = row_start + tl.arange(0, ROWS)
    blocks = tl.arange(0, 16)
    zero = tl.zeros((ROWS, 16), tl.uint32)
    c0 = (rows | head << 20).to(tl.uint32)[:, None] + zero
    c1 = (16 * tile + blocks).to(tl.uint32)[None, :] + zero
    c2, c3 = zero + sample_low.to(tl.uint32), zero + sample_high.to(tl.uint32)
    key0, key1 = zero + k0.to(tl.uint32), zero + k1.to(tl.uint32)
    for _ in tl.static_range(10):
        hi0, lo0 = mulhilo(c0, 0xD2511F53)
        hi1, lo1 = mulhilo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    for word in tl.static_range(4):
        x = c0 if word == 0 else (c1 if word == 1 else (c2 if word == 2 else c3))
        lanes = tl.join(x & 0xFFFF, x >> 16).reshape(ROWS, 32)  # neighbours in a thread's registers
        columns = 128 * tile + 32 * word + tl.arange(0, 32)
        keep = lanes.to(tl.int32) >= threshold
        tl.store(out + rows[:, None] * COLUMNS + columns[None, :], keep, mask=columns[None, :] < COLUMNS)

rows, columns, head, sample = 16, 300, 2, 5 + (1 << 33)
key = MaskKey(seed=11, step=3, layer=4)
k0, k1 = ops.derive_key(*key.words)
out = torch.zeros(rows, columns, dtype=torch.bool)
t = masks.threshold(0.3)
for tile in range(3):
    element_tile[(1,)](out, k0, k1, sample & 0xFFFFFFFF, sample >> 32, head, t, 0, tile, ROWS=rows, COLUMNS=columns)
expected = masks.element(key, [sample], rows, columns, 0.3, heads=3).to_torch()[0, head]
assert 0.2 < 1 - expected.float().mean() < 0.4
assert torch.equal(out, expected), (out != expected).sum()
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_triton_tile_draws_the_same_bits(tmp_path) -> None:
    source = tmp_path / "tile.py"  # Triton reads a kernel's source from its file
    source.write_text(KERNEL)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(source)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"
