"""Masks: three implementations agree to the bit, on shared vectors and on generated cases; typed errors; purity."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenkey_rs import ConfigError, DataError, HiddenKeyConfig, MaskKey, _core, masks, ops
from hiddenkey_rs.masks import SITES
from reference import masks as reference
from reference.philox import philox4x32
from vectors import read

SITE_NAMES = list(SITES)


def test_philox_known_answers() -> None:
    lines = read("philox.txt")
    assert len(lines) >= 3
    for line in lines:
        words = [int(word, 16) for word in line]
        counter, key, output = words[:4], tuple(words[4:6]), words[6:]
        assert list(philox4x32(tuple(counter), key)) == output
        assert [int(word) for word in ops.philox(*map(torch.tensor, counter), key)] == output


def test_site_keys() -> None:
    lines = read("keys.txt")
    assert len(lines) >= 10
    for *site, key in lines:
        numbers = [int(number) for number in site]
        expected = (int(key[:8], 16), int(key[8:], 16))
        assert reference.site_key(*numbers) == expected
        assert _core.derive_key(tuple(numbers)) == expected
        assert ops.derive_key(*numbers) == expected


def _drawn(pattern: str, key: MaskKey, samples, heads: int, rows: int, columns: int, t: int, lengths):
    rate = t / 65536
    site_key = ops.derive_key(*key.words)
    ids = torch.tensor(samples)
    if pattern == "element":
        mine = masks.element(key, samples, rows, columns, rate, heads=heads)
        theirs = ops.element_keep(site_key, ids, rows, columns, t, heads)
    elif pattern == "column":
        mine = masks.column(key, samples, columns, rate, heads=heads)
        theirs = ops.column_keep(site_key, ids, columns, t, heads)
    else:
        mine = masks.span(key, samples, lengths, rate, heads=heads)
        theirs = ops.span_keep(site_key, ids, torch.tensor(lengths), columns, t, heads)
    return mine, theirs.numpy()


def test_mask_vectors() -> None:
    lines = read("masks.txt")
    assert len(lines) >= 150
    for line in lines:
        seed, step, branch, layer, site = map(int, line[1:6])
        samples = [int(sample) for sample in line[6].split(",")]
        heads, rows, columns, t = map(int, line[7:11])
        lengths = [int(n) for n in line[11].split(",")] if line[0] == "span" else None
        key = MaskKey(seed, step, branch, layer, SITE_NAMES[site])
        mine, theirs = _drawn(line[0], key, samples, heads, rows, columns, t, lengths)
        assert "".join(f"{word:08x}" for word in mine.words.ravel()) == line[-1], line[:12]
        assert np.array_equal(mine.to_bool(), theirs), line[:12]


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(["element", "column", "span"]),
    key=st.builds(
        MaskKey,
        seed=st.integers(0, 2**64 - 1),
        step=st.integers(0, 2**32 - 1),
        branch=st.integers(0, 255),
        layer=st.integers(0, 1023),
        site=st.sampled_from(SITE_NAMES),
    ),
    samples=st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 140),
    t=st.integers(0, 65536),
    data=st.data(),
)
def test_rust_numpy_and_torch_agree(pattern, key, samples, heads, rows, columns, t, data) -> None:
    lengths = [data.draw(st.integers(0, columns)) for _ in samples]
    lengths[0] = columns
    mine, theirs = _drawn(pattern, key, samples, heads, rows, columns, t, lengths)
    where = (key.seed, key.step, key.branch, key.layer, key.site, samples)
    expected = {
        "element": lambda: reference.element(*where, rows, columns, t / 65536, heads=heads),
        "column": lambda: reference.column(*where, columns, t / 65536, heads=heads),
        "span": lambda: reference.span(*where, lengths, t / 65536, heads=heads),
    }[pattern]()
    assert np.array_equal(mine.to_bool(), expected)
    assert np.array_equal(theirs, expected)
    assert np.array_equal(mine.words, reference.pack(expected))
    assert mine.kept() == expected.sum()


def test_a_mask_does_not_know_its_batch_nor_its_width() -> None:
    key = MaskKey(seed=3, step=4, layer=5, site="ffn")
    whole = masks.element(key, [7, 8, 9], 40, 70, 0.3, heads=2).to_bool()
    for n, sample in enumerate((7, 8, 9)):
        alone = masks.element(key, [sample], 25, 33, 0.3, heads=1).to_bool()
        assert np.array_equal(alone[0, 0], whole[n, 0, :25, :33])


def test_every_coordinate_matters() -> None:
    base = {"seed": 1, "step": 2, "branch": 0, "layer": 3, "site": "attention"}
    drawn = [masks.element(MaskKey(**base), [5], 4, 256, 0.5)]
    for change in ({"seed": 2}, {"seed": 1 + 2**40}, {"step": 3}, {"branch": 1}, {"layer": 4}, {"site": "ffn"}):
        drawn.append(masks.element(MaskKey(**{**base, **change}), [5], 4, 256, 0.5))
    drawn += [masks.element(MaskKey(**base), [sample], 4, 256, 0.5) for sample in (6, 5 + 2**32)]
    drawn.append(masks.column(MaskKey(**base), [5], 256, 0.5, heads=4))
    bits = [np.unpackbits(mask.words.view(np.uint8)).astype(float) for mask in drawn]
    for a in range(len(bits)):
        for b in range(a):
            # 1024 fair bits: a correlation of .16 is five standard deviations
            assert abs(np.corrcoef(bits[a], bits[b])[0, 1]) < 0.16, (a, b)


def test_rows_and_heads_differ() -> None:
    mask = masks.element(MaskKey(), [0], 8, 512, 0.5, heads=4).to_bool().reshape(32, 512)
    assert len(np.unique(mask, axis=0)) == 32


@pytest.mark.parametrize("rate", [2**-16, 0.01, 0.1, 0.5, 0.9, 1 - 2**-16])
def test_the_rate_is_the_realised_one(rate: float) -> None:
    draws = 1 << 22
    kept = masks.element(MaskKey(seed=9), [1], 1 << 10, 1 << 12, rate).kept()
    p = masks.realised(rate)
    assert abs(draws - kept - p * draws) < 5 * (p * (1 - p) * draws) ** 0.5 + 1


def test_rates_zero_and_one_are_exact() -> None:
    assert masks.column(MaskKey(), [0, 1], 1000, 0.0).to_bool().all()
    assert not masks.column(MaskKey(), [0, 1], 1000, 1.0).to_bool().any()
    assert masks.span(MaskKey(), [0, 1], [10, 3], 0.0).to_bool().sum() == 13
    assert masks.span(MaskKey(), [0, 1], [10, 3], 1.0).to_bool().sum() == 0


def test_spans_are_one_block_of_the_defined_length() -> None:
    lengths = np.arange(1, 60)
    keep = masks.span(MaskKey(seed=2), np.arange(59), lengths, 0.3).to_bool()[:, 0, 0]
    for n, length in enumerate(lengths):
        dropped = np.flatnonzero(~keep[n, :length])
        assert len(dropped) == max(1, (19661 * length + 32768) >> 16)
        assert dropped[-1] - dropped[0] + 1 == len(dropped)
        assert not keep[n, length:].any()


def test_span_starts_are_uniform() -> None:
    keep = masks.span(MaskKey(seed=5), np.arange(20000), np.full(20000, 10), 0.3).to_bool()[:, 0, 0]
    starts = (~keep).argmax(axis=1)
    counts = np.bincount(starts, minlength=8)
    assert len(counts) == 8
    # chi-square with 7 degrees of freedom, p < 1e-5 beyond 36
    assert ((counts - 2500) ** 2 / 2500).sum() < 36


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: masks.element(MaskKey(), [0], 1, 1, 1.5),
            ConfigError,
            r"rate must be a number in \[0, 1\] \(got 1.5\)",
        ),
        (lambda: masks.element(MaskKey(), [0], 1, 1, float("nan")), ConfigError, "got nan"),
        (lambda: masks.element(MaskKey(), [0], 1, 1, True), ConfigError, "got True"),
        (lambda: masks.element(MaskKey(), [0], -1, 1, 0.1), ConfigError, r"rows must be .*got -1"),
        (lambda: masks.element(MaskKey(), [0], 1, 2**20 + 1, 0.1), ConfigError, r"columns must be .*got 1048577"),
        (lambda: masks.element(MaskKey(), [0], 1, 1, 0.1, heads=1025), ConfigError, r"heads must be .*got 1025"),
        (lambda: masks.element(MaskKey(), [0], 1.5, 1, 0.1), ConfigError, r"rows must be an integer .*got 1.5"),
        (lambda: masks.column(MaskKey(), [-1], 1, 0.1), DataError, r"sample ids must lie in .*got -1"),
        (lambda: masks.column(MaskKey(), [2**40], 1, 0.1), DataError, rf"sample ids must lie in .*got {2**40}"),
        (lambda: masks.column(MaskKey(), [0.5], 1, 0.1), DataError, r"sample ids must be .*float64"),
        (lambda: masks.column(MaskKey(), [True], 1, 0.1), DataError, r"sample ids must be .*bool"),
        (lambda: masks.column(MaskKey(), [[0]], 1, 0.1), DataError, r"sample ids must be .*\(1, 1\)"),
        (lambda: masks.column(MaskKey(), ["a"], 1, 0.1), DataError, r"sample ids must be .*<U1"),
        (lambda: masks.span(MaskKey(), [0, 1], [5], 0.1), DataError, r"1 lengths for 2 samples"),
        (lambda: masks.span(MaskKey(), [0], [2**20 + 1], 0.1), DataError, r"lengths must lie in .*got 1048577"),
        (
            lambda: masks.element(MaskKey(), range(4096), 2**20, 2**20, 0.1, heads=1024),
            ConfigError,
            "does not fit into memory",
        ),
        (lambda: MaskKey(seed=-1), ConfigError, r"seed must be .*got -1"),
        (lambda: MaskKey(seed=2**64), ConfigError, r"seed must be"),
        (lambda: MaskKey(step=2**32), ConfigError, r"step must be .*got 4294967296"),
        (lambda: MaskKey(branch=256), ConfigError, "branch must be"),
        (lambda: MaskKey(layer=1024), ConfigError, r"layer must be .*got 1024"),
        (lambda: MaskKey(site="atention"), ConfigError, "did you mean 'attention'"),
        (
            lambda: _core.unpack(np.zeros((2, 1), np.uint32), 33, np.zeros(66, np.uint8)),
            DataError,
            "2 words of 33 columns a row for 66 places",
        ),
        (lambda: _core.derive_key((0, 0, 0, 1024, 0)), ConfigError, r"layer must lie in 0\.\.=1023 \(got 1024\)"),
    ],
)
def test_bad_arguments(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_empty_masks_are_no_error() -> None:
    assert masks.element(MaskKey(), [], 2, 3, 0.1).to_bool().shape == (0, 1, 2, 3)
    assert masks.element(MaskKey(), [1], 0, 3, 0.1).to_bool().shape == (1, 1, 0, 3)
    assert masks.column(MaskKey(), [1], 0, 0.1).to_bool().shape == (1, 1, 1, 0)
    assert masks.span(MaskKey(), [], [], 0.1).to_bool().shape == (0, 1, 1, 0)
    assert masks.span(MaskKey(), [4], [0], 0.1).kept() == 0


def test_strided_and_typed_sample_ids() -> None:
    expected = masks.column(MaskKey(), [0, 2, 4], 50, 0.5)
    for ids in (np.arange(6)[::2], np.array([0, 2, 4], np.uint8), np.array([0, 2, 4], np.int32), range(0, 6, 2)):
        assert masks.column(MaskKey(), ids, 50, 0.5) == expected
    assert masks.column(MaskKey(), [0, 2, 5], 50, 0.5) != expected


def test_words_are_handed_over_and_repr_says_what_it_is() -> None:
    mask = masks.column(MaskKey(), [0], 33, 0.0)
    assert mask.words.dtype == np.uint32
    assert mask.words.shape == (1, 1, 1, 2)
    assert mask.words[0, 0, 0, 1] == 1, "tail bits are zero"
    assert repr(mask) == "BitMask(shape=(1, 1, 1, 33), kept=33)"
    assert mask.to_torch().dtype == torch.bool


def test_the_gil_is_released() -> None:
    done: list[float] = []
    worker = threading.Thread(
        target=lambda: (masks.element(MaskKey(), [0], 1 << 13, 1 << 18, 0.1), done.append(time.perf_counter()))
    )
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
        time.sleep(0.0005)
    assert turns > 10, "this thread had to wait for the mask"


def test_masks_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, hiddenkey_rs; from hiddenkey_rs import masks, MaskKey, HiddenKeyConfig, StepPlan, plan_step;"
        "from hiddenkey_rs import get_num_threads, set_num_threads;"
        "masks.column(MaskKey(), [1], 9, .1).to_bool(); plan_step('dropkey-span', 0, [1], [9], layers=1, heads=1);"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_stream_is_named() -> None:
    assert masks.engine() == {
        "stream": _core.STREAM,
        "simd": masks.engine()["simd"],
        "threads": masks.get_num_threads(),
        "build": "release",
    }
    assert _core.STREAM == HiddenKeyConfig().stream == "hk1"
    assert masks.engine()["simd"] in ("portable", "avx2", "avx512")
