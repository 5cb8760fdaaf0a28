"""Packing is first fit decreasing, whatever the lengths; every token is in one row, and no row is too long."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hiddenkey_rs as hk
from hiddenkey_rs import ConfigError, DataError, pack
from reference import pack as reference

TOO_LONG = ("refuse", "truncate", "split")


def pieces(packing: hk.Packing, lengths) -> list[list[tuple[int, int, int]]]:
    """(document, start, length) of each row, as the reference has them."""
    rows = []
    for row in range(len(packing)):
        at = slice(*packing.offsets[row : row + 2])
        documents = packing.documents[at].tolist()
        if packing.starts is None:
            rows.append([(document, 0, min(int(lengths[document]), packing.capacity)) for document in documents])
        else:
            rows.append(list(zip(documents, packing.starts[at].tolist(), packing.lengths[at].tolist(), strict=True)))
    return rows


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=120),
    capacity=st.integers(1, 70),
    too_long=st.sampled_from(TOO_LONG),
    dtype=st.sampled_from([None, np.int64, np.int32, np.uint8, np.uint64]),
)
@example(lengths=[], capacity=4, too_long="split", dtype=None)
@example(lengths=[0, 0], capacity=4, too_long="refuse", dtype=np.int32)
@example(lengths=[8, 4, 4, 3], capacity=4, too_long="split", dtype=np.int64)
@example(lengths=[2, 3, 5, 7, 5, 3, 2, 1], capacity=7, too_long="refuse", dtype=np.int64)
def test_it_is_the_reference(lengths: list[int], capacity: int, too_long: str, dtype) -> None:
    if too_long == "refuse":
        lengths = [min(length, capacity) for length in lengths]
    given_as = lengths if dtype is None else np.array(lengths, dtype)
    packing = pack(given_as, capacity, too_long=too_long)
    expected = reference.pack(lengths, capacity, too_long)
    assert pieces(packing, lengths) == expected
    assert len(packing) == len(expected)
    assert [row.tolist() for row in packing] == [[document for document, _, _ in row] for row in expected]
    assert (packing.starts is None, packing.lengths is None) == (too_long != "split",) * 2
    assert packing.tokens == sum(length for row in expected for _, _, length in row)
    assert {packing.offsets.dtype, packing.documents.dtype} == {np.dtype(np.int64)}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(0, 1000),
    capacity=st.sampled_from([31, 63, 64, 65, 512, 4096]),
    too_long=st.sampled_from(["truncate", "split"]),
)
def test_every_token_is_there_once(seed: int, size: int, capacity: int, too_long: str) -> None:
    lengths = np.random.default_rng(seed).geometric(1 / 200, size) - 1
    packing = pack(lengths, capacity, too_long=too_long)
    taken = np.minimum(lengths, capacity) if too_long == "truncate" else lengths
    seen = np.zeros(int(taken.sum()), np.int64)
    begins = np.concatenate([[0], np.cumsum(taken)])
    for row in pieces(packing, lengths):
        assert 0 < sum(length for _, _, length in row) <= capacity
        for document, start, length in row:
            seen[begins[document] + start : begins[document] + start + length] += 1
    assert (seen == 1).all()
    assert packing.fill == pytest.approx(taken.sum() / max(len(packing) * capacity, 1) if len(packing) else 1.0)


def test_many_different_rows() -> None:
    """Thousands of lengths, so that the runs of equal rows fill many blocks."""
    lengths = np.random.default_rng(0).integers(1, 5000, 6000)
    packing = pack(lengths, 6000)
    space, rows = np.full(len(lengths), 6000), []
    for document in np.argsort(-lengths, kind="stable"):
        row = int(np.argmax(space >= lengths[document]))
        space[row] -= lengths[document]
        rows.append((row, int(document)))
    expected = [document for _, document in sorted(rows, key=lambda place: place[0])]
    assert packing.documents.tolist() == expected
    assert len(packing) == np.count_nonzero(space < 6000)


@pytest.mark.parametrize("draw", ["short", "even"])
def test_rows_are_as_full_as_trls(draw: str) -> None:
    """TRL's best fit decreasing, on the same lengths: within .2 points of its fill."""
    trl = pytest.importorskip("trl.data_utils")
    pa = pytest.importorskip("pyarrow")
    rng = np.random.default_rng(7)
    lengths = np.clip(rng.lognormal(5.3, 0.9, 20_000), 1, 2048).astype(np.int64)
    if draw == "even":
        lengths = rng.integers(1, 2049, 20_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(offsets[-1], np.int32)))
    theirs = trl._pack_bfd(pa.table({"input_ids": column}), 2048)
    fill = lengths.sum() / (len(theirs) * 2048)
    assert pack(lengths, 2048).fill == pytest.approx(fill, abs=0.002)


def test_others_run_meanwhile() -> None:
    """The core releases the interpreter's lock."""
    lengths = np.random.default_rng(0).integers(1, 2049, 6_000_000)
    worker = threading.Thread(target=lambda: pack(lengths, 2048))
    worker.start()
    ticks = 0
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks >= 10


def test_rows_are_looked_up() -> None:
    packing = pack([3, 9, 1, 7, 0], 10)
    assert packing[0].tolist() == [1, 2]
    assert packing[1].tolist() == [3, 0]
    for row in (2, -1):
        with pytest.raises(IndexError, match=rf"outside 0\.\.1 \(got {row}\)"):
            packing[row]
    assert repr(packing) == "Packing(2 rows of 10, 4 pieces, fill 1.0000)"
    assert pack([], 4).fill == 1.0
    assert pack([1], 4).fill == 0.25


@pytest.mark.parametrize(
    ("lengths", "change", "error", "message"),
    [
        ([1], {"capacity": 0}, ConfigError, r"capacity must be an integer in 1\.\.=16777216 \(got 0\)"),
        ([1], {"capacity": -3}, ConfigError, r"capacity .*got -3"),
        ([1], {"capacity": 2**24 + 1}, ConfigError, r"capacity .*got 16777217"),
        ([1], {"capacity": 2.0}, ConfigError, r"capacity .*got 2\.0"),
        ([1], {"too_long": "cut"}, ConfigError, r"unknown too_long \(got 'cut'\).*refuse, truncate, split"),
        ([3, 9, 10], {}, DataError, r"document 1 does not fit into a row of 8 tokens \(got 9\); .*truncate"),
        (np.array([3, 9], np.int32), {}, DataError, r"document 1 does not fit .*\(got 9\)"),
        ([3, -1], {}, DataError, r"document 1 has a negative length \(got -1\)"),
        ([3, -1], {"too_long": "split"}, DataError, r"document 1 has a negative length"),
        ([1.0], {}, DataError, r"lengths must be .*float64"),
        ([[1], [2, 3]], {}, DataError, r"lengths must be .*no array"),
        ([[1, 2]], {}, DataError, r"lengths must be .*shape \(1, 2\)"),
        (["a"], {}, DataError, r"lengths must be .*<U1"),
        ([2**62], {"too_long": "split"}, DataError, r"at most 2\^28 pieces .*\(got 576460752303423488\)"),
        ([2**63 - 1] * 30, {"too_long": "split", "capacity": 1}, DataError, r"pieces .*\(got 18446744073709551615\)"),
        (np.array([2**64 - 1], np.uint64), {}, DataError, r"document 0 does not fit .*\(got 9223372036854775807\)"),
    ],
)
def test_bad_arguments(lengths, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack(lengths, **{"capacity": 8, **change})


def test_a_length_of_any_size_may_be_truncated() -> None:
    assert pack([2**63 - 1, 3], 8, too_long="truncate").tokens == 11
