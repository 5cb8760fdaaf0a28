"""Stream hk1 is frozen: digests over the counter's whole range, by the reference, by torch and on every instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hiddenkey_rs import ops
from hiddenkey_rs.masks import SITES
from hiddenkey_rs.ops import generator
from reference.masks import pack
from vectors import generate, read
from vectors.check import whole_cases

LINES = read("digests.txt")
GRIDS = [line[1:] for line in LINES if line[0] == "grid"]
WHOLE = list(whole_cases())


def test_the_reference_writes_every_vector_file_again() -> None:
    folder = Path(generate.__file__).parent
    assert generate.digests() == (folder / "digests.txt").read_text()
    assert generate.mask_lines() == (folder / "masks.txt").read_text()
    assert generate.keys() == (folder / "keys.txt").read_text()
    assert (folder / "philox.txt").read_text() == generate.PHILOX


def test_the_digests_reach_the_limits() -> None:
    sites = np.array([line[1:6] for line in GRIDS], dtype=object).astype(object)
    seeds, steps, branches, layers, codes = ({int(n) for n in column} for column in sites.T)
    assert (max(seeds), max(steps), max(layers)) == (2**64 - 1, 2**32 - 1, 1023)
    assert (branches, codes) == ({0, 1, 255}, set(SITES.values()))
    assert (max(generate.SAMPLES), max(generate.HEADS), max(generate.ROWS)) == (2**40 - 1, 1023, 2**20 - 1)
    assert 128 * (max(generate.TILES) + 1) == max(generate.LENGTHS) == 2**20


def _grid_in_torch(pattern: str, site: tuple[int, ...]) -> np.ndarray:
    key = ops.derive_key(*site)
    tag = {"element": 0, "column": 1, "span": 2}[pattern]
    found = []
    for sample, head in itertools.product(generate.SAMPLES, generate.HEADS):
        c2, c3 = generator._sample_words(torch.tensor([sample]), tag)
        if pattern == "span":
            draw = int(ops.philox(head << 20, 0, c2, c3, key)[0])
            for length, t in itertools.product(generate.LENGTHS, generate.THRESHOLDS):
                dropped = int(generator.span_length(torch.tensor([length]), t))
                found.append([draw * (length - dropped + 1) >> 32, dropped])
            continue
        for row, tile in itertools.product(generate.ROWS if pattern == "element" else (0,), generate.TILES):
            words = ops.philox(row | head << 20, 16 * tile + torch.arange(16), c2, c3, key)
            found += [pack(generator._lay(words, 128, t).numpy()) for t in generate.THRESHOLDS]
    return np.array(found, dtype=np.uint32)


@pytest.mark.parametrize("pattern", ["element", "column", "span"])
def test_grids_in_torch(pattern: str) -> None:
    lines = [line for line in GRIDS if line[0] == pattern]
    assert len(lines) == 31
    for line in lines:
        assert generate.digest(_grid_in_torch(pattern, tuple(map(int, line[1:6])))) == line[6], line


def test_whole_masks_in_torch() -> None:
    assert len(WHOLE) >= 8
    for pattern, site, samples, heads, rows, columns, t, lengths, digest in WHOLE:
        key, ids = ops.derive_key(*site), torch.tensor(samples)
        if pattern == "element":
            keep = ops.element_keep(key, ids, rows, columns, t, heads)
        elif pattern == "column":
            keep = ops.column_keep(key, ids, columns, t, heads)
        else:
            keep = ops.span_keep(key, ids, torch.tensor(lengths), columns, t, heads)
        assert generate.digest(pack(keep.numpy())) == digest, pattern


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_whole_masks_on_every_instruction_set(level: str) -> None:
    env = {**os.environ, "HIDDENKEY_SIMD": level, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-m", "vectors.check"], env=env, capture_output=True, text=True, check=False)
    if "names no instruction set of this processor" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.stdout == f"{level}\n", done.stderr
