"""Batches are what the reference writes place by place; wrong rows, offsets and ids are named, and touch nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenkey_rs import ConfigError, DataError, pack
from hiddenkey_rs.batches.pad import Gatherer, Layout, Source
from reference import pad as reference

INTEGERS = [np.int32, np.int64]


@dataclass
class Data:
    """Random documents with columns beside them."""

    seed: int
    lengths: list[int]
    values_as: type
    columns_as: type

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        tokens = int(self.offsets[-1])
        self.values = rng.integers(0, 2**31 if self.values_as is np.int32 else 2**62, tokens).astype(self.values_as)
        self.labels = rng.integers(-100, 2**31, tokens).astype(self.columns_as)
        self.types = rng.integers(0, 3, tokens).astype(self.columns_as)
        self.sample_ids = rng.integers(0, 2**40, len(self.lengths))

    def source(self, labels: bool, types: bool, ids: bool) -> Source:
        return Source(
            self.values,
            self.offsets,
            self.labels if labels else None,
            self.types if types else None,
            self.sample_ids if ids else None,
        )


DATA = st.builds(
    Data,
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    values_as=st.sampled_from(INTEGERS),
    columns_as=st.sampled_from(INTEGERS),
)


@settings(max_examples=250, deadline=None)
@given(
    data=DATA,
    chosen=st.lists(st.integers(-1, 1000), min_size=1, max_size=9),
    labels=st.sampled_from([None, "column", "tokens"]),
    types=st.booleans(),
    ids=st.booleans(),
    left=st.booleans(),
    mask=st.booleans(),
    positions=st.booleans(),
    pad=st.sampled_from([0, 1, 2**40]),
    multiple=st.sampled_from([1, 2, 8, 64]),
    max_length=st.sampled_from([None, 1, 7, 40]),
    joined=st.booleans(),
)
def test_batches_are_the_reference(
    data, chosen, labels, types, ids, left, mask, positions, pad, multiple, max_length, joined
) -> None:
    rows = [row if row == -1 else row % len(data.lengths) for row in chosen]
    layout = Layout(pad, left, multiple, max_length, None, mask, positions, copy_labels=labels == "tokens")
    gatherer = Gatherer(data.source(labels == "column", types, ids), layout)
    documents = [reference.document(data.offsets, row, max_length) for row in rows]
    grouped = [documents] if joined else [[document] for document in documents]
    width = reference.width_of(grouped, multiple)
    expected = reference.lay(
        data.values,
        data.offsets,
        grouped,
        width,
        pad=pad,
        left=left and not joined,
        joined=joined,
        labels=data.labels if labels == "column" else None,
        types=data.types,
        sample_ids=data.sample_ids if ids else None,
    )
    gathered = gatherer.join(rows) if joined else gatherer.pad(rows)
    names = ["input_ids"] + ["attention_mask"] * mask + ["labels"] * (labels is not None)
    names += ["token_type_ids"] * types + ["position_ids"] * positions
    assert list(gathered.arrays()) == names
    for name, array in gathered.arrays().items():
        assert array.dtype == np.int64
        assert np.array_equal(array, expected[name]), name
    lengths = [length for _, _, length in documents]
    if joined:
        assert np.array_equal(gathered.samples, expected["sample_id"])
        assert gathered.boundaries.tolist() == reference.boundaries(grouped, width)
        assert gathered.boundaries.dtype == np.int32
        assert gathered.longest == max(np.diff(gathered.boundaries))
        real = [number for number, (row, _, length) in enumerate(documents) if row >= 0 and length]
    else:
        assert gathered.samples.tolist() == [-1 if r == -1 else int(data.sample_ids[r]) if ids else r for r in rows]
        assert gathered.boundaries is None
        assert gathered.longest == max(lengths)
        real = range(len(rows))
    samples, sizes = gatherer.real_documents(gathered)
    assert sizes.tolist() == [lengths[number] for number in real]
    known = [-1 if row == -1 else int(data.sample_ids[row]) if ids else row for row in rows]
    assert samples.tolist() == [known[number] for number in real]


@settings(max_examples=150, deadline=None)
@given(
    data=DATA,
    capacity=st.integers(1, 50),
    too_long=st.sampled_from(["truncate", "split"]),
    picks=st.lists(st.integers(-1, 1000), min_size=1, max_size=5),
    labels=st.sampled_from([None, "column", "tokens"]),
    ids=st.booleans(),
)
def test_packed_rows_are_the_reference(data, capacity, too_long, picks, labels, ids) -> None:
    packing = pack(data.lengths, capacity, too_long=too_long)
    rows = [pick if pick == -1 or not len(packing) else pick % len(packing) for pick in picks]
    rows = rows if len(packing) else [-1]
    grouped = []
    for row in rows:
        at = slice(*packing.offsets[row : row + 2]) if row >= 0 else slice(0)
        documents = packing.documents[at].tolist()
        if packing.starts is None:
            grouped.append([(document, 0, min(data.lengths[document], capacity)) for document in documents])
        else:
            cuts = (packing.starts[at].tolist(), packing.lengths[at].tolist())
            grouped.append(list(zip(documents, *cuts, strict=True)))
    expected = reference.lay(
        data.values,
        data.offsets,
        grouped,
        capacity,
        pad=3,
        joined=True,
        labels=data.labels if labels == "column" else None,
        types=data.types,
        sample_ids=data.sample_ids if ids else None,
    )
    layout = Layout(3, mask=False, positions=True, copy_labels=labels == "tokens")
    gatherer = Gatherer(data.source(labels == "column", True, ids), layout)
    gathered = gatherer.join_packed(packing, np.array(rows))
    for name, array in gathered.arrays().items():
        assert np.array_equal(array, expected[name]), name
    assert np.array_equal(gathered.samples, expected["sample_id"])
    assert gathered.boundaries.tolist() == reference.boundaries(grouped, capacity)
    assert gathered.longest == max(np.diff(gathered.boundaries))
    pieces = [piece for row in grouped for piece in row]
    samples, sizes = gatherer.real_documents(gathered)
    assert sizes.tolist() == [start + length for _, start, length in pieces], "masks are the whole document's"
    assert samples.tolist() == [int(data.sample_ids[row]) if ids else row for row, _, _ in pieces]


def test_by_hand() -> None:
    source = Source(np.arange(10, 16, dtype=np.int32), np.array([0, 3, 3, 4, 6]), sample_ids=np.array([7, 8, 9, 5]))
    right = Gatherer(source, Layout(1, multiple_of=4, positions=True, copy_labels=True)).pad([0, -1, 1, 3])
    assert {name: array.tolist() for name, array in right.arrays().items()} == {
        "input_ids": [[10, 11, 12, 1], [1, 1, 1, 1], [1, 1, 1, 1], [14, 15, 1, 1]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]],
        "labels": [[10, 11, 12, -100], [-100] * 4, [-100] * 4, [14, 15, -100, -100]],
        "position_ids": [[0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]],
    }
    assert right.samples.tolist() == [7, -1, 8, 5]
    left = Gatherer(source, Layout(1, left=True, max_length=2)).pad([0, 2, -1]).arrays()
    assert left["input_ids"].tolist() == [[10, 11], [1, 13], [1, 1]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1], [0, 1]]
    flat = Gatherer(source, Layout(1, multiple_of=8, mask=False, positions=True, copy_labels=True)).join([3, -1, 0])
    assert {name: array.tolist() for name, array in flat.arrays().items()} == {
        "input_ids": [[14, 15, 1, 10, 11, 12, 1, 1]],
        "labels": [[-100, 15, -100, -100, 11, 12, -100, -100]],
        "position_ids": [[0, 1, 0, 0, 1, 2, 0, 1]],
    }
    assert flat.samples.tolist() == [[5, 5, -1, 7, 7, 7, -1, -1]]
    assert flat.boundaries.tolist() == [0, 2, 3, 6, 8]


@settings(max_examples=200, deadline=None)
@given(
    values=st.integers(0, 12),
    offsets=st.lists(
        st.one_of(st.integers(-2, 14), st.sampled_from([2**63 - 1, -(2**63), 2**31, 2**32 + 1])), min_size=1, max_size=6
    ),
    rows=st.lists(st.one_of(st.integers(-3, 7), st.sampled_from([2**63 - 1, -(2**63)])), min_size=1, max_size=4),
    joined=st.booleans(),
    wide=st.booleans(),
)
def test_offsets_and_rows_of_any_kind(values, offsets, rows, joined, wide) -> None:
    """What does not stand within the values is an error that names the row; nothing else happens."""
    tokens = np.arange(values, dtype=np.int64 if wide else np.int32)
    gatherer = Gatherer(Source(tokens, np.array(offsets, np.int64)), Layout(copy_labels=True))
    outside = [row for row in rows if not -1 <= row < len(offsets) - 1]
    wrong = [
        row for row in rows if row >= 0 and row not in outside and not 0 <= offsets[row] <= offsets[row + 1] <= values
    ]
    make = gatherer.join if joined else gatherer.pad
    if outside or wrong:
        first = next(row for row in rows if row in outside or row in wrong)
        expected = (
            rf"no such row \(got {first},"
            if first in outside
            else rf"the offsets of row {first} go backwards or beyond"
        )
        with pytest.raises(DataError, match=expected):
            make(rows)
        return
    ids = make(rows).arrays()["input_ids"]
    taken = [tokens[offsets[row] : offsets[row + 1]].tolist() if row >= 0 else [0] for row in rows]
    assert sum(ids.sum(axis=1)) == sum(map(sum, taken))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("place", [0, 3, 16, 30])
def test_ids_beyond_the_vocabulary(dtype, joined: bool, place: int) -> None:
    def batch(token: int, vocabulary: int | None):
        values = np.full(50, 5, dtype)
        values[8 + place] = token
        gatherer = Gatherer(Source(values, np.array([0, 8, 40, 50])), Layout(vocabulary=vocabulary, copy_labels=True))
        return (gatherer.join if joined else gatherer.pad)([2, 1, 0]).arrays()["input_ids"]

    largest = np.iinfo(dtype).max - (dtype is np.int64)  # of 64 bits, the largest is no id even without a vocabulary
    for token, vocabulary in ((99, 100), (largest, None), (largest, 2**62) if dtype is np.int32 else (5, 6)):
        assert batch(token, vocabulary).max() == token
    for token, vocabulary in ((100, 100), (-1, 100), (largest, 100), (-1, None), (np.iinfo(dtype).min, None), (6, 6)):
        named = rf"row 1 holds a token id outside the vocabulary \(got {token} at position {place}, "
        with pytest.raises(DataError, match=named):
            batch(token, vocabulary)


def test_only_rows_that_are_taken_are_looked_at() -> None:
    """A batch costs what it holds: a wrong row elsewhere is found when it is taken."""
    source = Source(np.array([1, -5, 2]), np.array([0, 1, 2, 3]))
    gatherer = Gatherer(source, Layout())
    assert gatherer.pad([2, 0]).arrays()["input_ids"].tolist() == [[2], [1]]
    with pytest.raises(DataError, match=r"row 1 holds .*got -5 at position 0"):
        gatherer.pad([2, 1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"a batch needs rows \(got shape \(0,\)\)"),
        ([[0]], r"a batch needs rows \(got shape \(1, 1\)\)"),
        (0, r"a batch needs rows \(got shape \(\)\)"),
        ([0.0], r"row numbers must be integers \(got float64\)"),
        (np.array([2**64 - 1], np.uint64), r"row numbers lie below 2\^63 \(got 18446744073709551615\)"),
        (["0"], r"row numbers must be integers \(got <U1\)"),
        ([2], r"there is no such row \(got 2, the store has 2\); pass 0\.\.2"),
        ([0, -2], r"there is no such row \(got -2,"),
    ],
)
def test_wrong_rows(rows, message: str) -> None:
    gatherer = Gatherer(Source(np.array([1, 2, 3]), np.array([0, 1, 3])), Layout())
    for make in (gatherer.pad, gatherer.join):
        with pytest.raises(DataError, match=message):
            make(rows)
    packed = (
        message.replace("the store has 2", "the packing has 1").replace("got 2,", "got 1,").replace(r"\.\.2", r"\.\.1")
    )
    with pytest.raises(DataError, match=packed):
        gatherer.join_packed(pack([1, 2], 3), [1] if rows == [2] else rows)


def test_rows_may_be_any_integers() -> None:
    gatherer = Gatherer(Source(np.array([1, 2, 3]), np.array([0, 1, 3])), Layout())
    for rows in ([1, 0], (1, 0), np.array([1, 0], np.int32), np.array([1, 9, 0])[::2], np.array([1, 0], np.uint64)):
        assert gatherer.pad(rows).samples.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"values": np.array([1.0, 2.0])},
            "tokens must be a contiguous array of int32 or int64 .*got an array of float64",
        ),
        ({"values": np.array([1, 2], np.uint16)}, "tokens must be .*uint16"),
        ({"values": np.arange(4)[::2]}, "tokens must be a contiguous"),
        ({"values": [1, 2]}, "tokens must be .*got list"),
        ({"values": np.array([[1, 2]])}, r"tokens must have one number a token \(got shape \(1, 2\)"),
        ({"offsets": np.array([0, 2], np.int32)}, "offsets must be .*int64 .*int32"),
        ({"offsets": np.array([], np.int64)}, r"offsets must have one number a row, and one more \(got shape \(0,\)"),
        ({"labels": np.array([1])}, r"labels must have one number a token \(got shape \(1,\), not \(2,\)\)"),
        ({"types": np.array([1, 2, 3])}, r"token types must have .*got shape \(3,\)"),
        ({"sample_ids": np.array([1, 2])}, r"sample ids must have one number a row \(got shape \(2,\), not \(1,\)\)"),
        ({"sample_ids": np.array([1], np.int32)}, "sample ids must be .*int32"),
    ],
)
def test_wrong_sources(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Source(**{"values": np.array([1, 2]), "offsets": np.array([0, 2]), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_token_id": -1}, r"pad_token_id must be .*got -1"),
        ({"pad_token_id": None}, r"pad_token_id must be .*got None"),
        ({"multiple_of": 0}, r"pad_to_multiple_of must be .*got 0"),
        ({"multiple_of": 2**20 + 1}, r"pad_to_multiple_of must be .*got 1048577"),
        ({"max_length": 0}, r"max_length must be .*got 0"),
        ({"max_length": 1.5}, r"max_length must be .*got 1\.5"),
        ({"vocabulary": 0}, r"vocabulary must be .*got 0"),
    ],
)
def test_wrong_layouts(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(**change)


def test_memory_is_the_callers() -> None:
    gatherer = Gatherer(Source(np.array([1, 2, 3]), np.array([0, 1, 3])), Layout(copy_labels=True))
    memory = np.full(100, 9)
    gathered = gatherer.pad([0, 1], lambda shape: memory[: np.prod(shape)].reshape(shape))
    assert np.shares_memory(gathered.planes, memory)
    assert memory[:12].tolist() == [1, 0, 2, 3, 1, 0, 1, 1, 1, -100, 2, 3]
    assert (memory[12:] == 9).all()
    for shape in ((3, 2, 1), (3, 1, 2), (2, 2, 2)):
        with pytest.raises(DataError, match="memory and shape disagree"):
            gatherer.pad([0, 1], lambda _, shape=shape: np.empty(shape, np.int64))


def test_a_batch_that_no_memory_holds() -> None:
    offsets = np.array([0, 2**50])
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.int64), (2**50,), (0,))
    with pytest.raises(DataError, match="tokens must be a contiguous"):
        Source(huge, offsets)
    gatherer = Gatherer(Source(np.array([1]), np.array([0, 1])), Layout(multiple_of=2**20))
    with pytest.raises(ConfigError, match=r"a batch does not fit into memory \(got shape \(2, 20000000, 1048576\)"):
        gatherer.pad(np.zeros(20_000_000, np.int64))
