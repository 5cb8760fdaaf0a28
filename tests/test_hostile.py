"""Hostile arguments: the right result or a typed error, never a panic, a crash or a wrong mask."""

from __future__ import annotations

import contextlib
import decimal
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hiddenkey_rs as hk
from hiddenkey_rs import HiddenKeyError, MaskKey, _core, masks, plan_step
from hiddenkey_rs.batches.order import Order
from hiddenkey_rs.errors import ConfigError, DataError
from hiddenkey_rs.masks import SITES
from reference import masks as reference

EDGES = [0, 1, 2, 31, 32, 33, 255, 256, 1023, 1024, 1025, 2**16, 2**20 - 1, 2**20, 2**20 + 1, 2**31, 2**32 - 1, 2**32]
EDGES += [2**40 - 1, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**65, 10**30]
EDGES += [-edge for edge in EDGES if edge]
WHOLE = st.sampled_from(EDGES) | st.integers(0, 5)
DTYPES = [
    "i1",
    "u1",
    "i2",
    "u2",
    "i4",
    "u4",
    "i8",
    "u8",
    ">i8",
    ">u2",
    "f4",
    "f8",
    "?",
    "O",
    "c16",
    "M8[s]",
    "U3",
    "S2",
]
STRANGE = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            "1",
            b"1",
            1.0,
            1.5,
            float("nan"),
            float("inf"),
            1j,
            np.float32(2),
            np.bool_(True),
            object(),
        ),
        *((), [1], {}, decimal.Decimal(1), np.array(3), np.array([3]), np.array([1, 2]), torch.tensor(1)),
        np.datetime64(1, "s"),
    ]
)
NUMPYS = st.sampled_from([np.int8(100), np.uint8(250), np.int16(33), np.uint64(3), np.int64(-1), np.uint64(2**64 - 1)])
EXTENT = st.integers(0, 5) | WHOLE | NUMPYS | STRANGE
RATE = st.floats(0, 1) | st.floats() | WHOLE | STRANGE
CASES = int(os.environ.get("HIDDENKEY_CASES", "300"))
SEARCH = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def numbers(draw):
    """Sample ids or lengths: good ones, and everything that a list or an array can be."""
    kind = draw(st.integers(0, 9))
    if kind < 3:
        return draw(st.lists(st.integers(0, 40), max_size=3))
    values = draw(st.lists(WHOLE, max_size=3))
    if kind < 5:
        return values
    if kind == 5:
        return draw(
            st.sampled_from([[[0]], [[0], [1, 2]], [], [[]], np.zeros((0, 2), int), range(3), (0, 1), {1, 2}, {}])
        )
    if kind == 6:
        return draw(STRANGE)
    array = np.zeros(2 * len(values), dtype=draw(st.sampled_from(DTYPES)))
    with np.errstate(all="ignore"):
        try:
            array[::2] = values
        except (OverflowError, TypeError, ValueError):
            array[::2] = np.ones(len(values), dtype=array.dtype)
    if kind == 7:
        return array[::2]
    return array if kind == 8 else torch.arange(len(values), dtype=torch.int32)


def bearable(samples, *extents) -> bool:
    """Whether a mask, were it drawn, would be small enough for a test."""
    places = 3
    for extent in extents:
        places *= max(int(extent), 1) if isinstance(extent, (int, np.integer)) else 1
    return places < 2**23 or any(isinstance(e, (int, np.integer)) and not 0 <= e <= 2**20 for e in extents)


def outcome(call):
    """The result, or ``None`` if the library refused. A panic or an error of another kind goes through."""
    try:
        return call()
    except HiddenKeyError as refusal:
        text = str(refusal)
    assert " (got " in text, "the value is named"
    assert "; " in text, "there is a way out"
    return None


KEY = MaskKey(seed=3, layer=1, site="ffn")
WHERE = (3, 0, 0, 1, "ffn")


@SEARCH
@given(samples=numbers(), rows=EXTENT, columns=EXTENT, rate=RATE, heads=EXTENT)
def test_elements(samples, rows, columns, rate, heads) -> None:
    if not bearable(samples, rows, columns, heads):
        return
    mask = outcome(lambda: masks.element(KEY, samples, rows, columns, rate, heads))
    keep = outcome(lambda: masks.element_bool(KEY, samples, rows, columns, rate, heads))
    assert (mask is None) == (keep is None)
    if mask is not None:
        ids = np.atleast_1d(np.asarray(samples)).tolist()
        assert np.array_equal(mask.to_bool(), keep)
        assert keep.shape == (len(ids), heads, rows, columns)
        if keep.size < 20_000:
            expected = reference.element(*WHERE, ids, int(rows), int(columns), float(rate), heads=int(heads))
            assert np.array_equal(keep, expected)


@SEARCH
@given(samples=numbers(), columns=EXTENT | st.none(), rate=RATE, heads=EXTENT, lengths=numbers())
def test_columns_and_spans(samples, columns, rate, heads, lengths) -> None:
    if not bearable(samples, columns, heads):
        return
    for draw in (
        lambda: masks.column(KEY, samples, columns, rate, heads),
        lambda: masks.column(KEY, samples, columns, rate, heads, lengths=lengths),
        lambda: masks.span(KEY, samples, lengths, rate, heads, columns=columns),
    ):
        mask = outcome(draw)
        if mask is not None:
            ids = np.atleast_1d(np.asarray(samples)).tolist()
            assert mask.shape[:3] == (len(ids), heads, 1)
            assert mask.to_bool().sum() == mask.kept()
            if np.size(mask.words) < 2000 and draw.__code__.co_names[1] == "span":
                sizes = [int(length) for length in np.atleast_1d(np.asarray(lengths))]
                expected = reference.span(*WHERE, ids, sizes, float(rate), heads=int(heads))
                assert np.array_equal(mask.to_bool()[..., : expected.shape[3]], expected)


@SEARCH
@given(ids=numbers(), lengths=numbers(), step=EXTENT, layers=EXTENT, heads=EXTENT, columns=st.none() | EXTENT)
def test_plans(ids, lengths, step, layers, heads, columns) -> None:
    if not bearable(ids, layers, heads, columns) or (columns is None and not bearable(ids, layers, heads, 2**20)):
        return
    plan = outcome(lambda: plan_step("hiddenkey", step, ids, lengths, layers=layers, heads=heads, columns=columns))
    if plan is not None and layers and plan.nbytes < 100_000:
        mask = masks.column(MaskKey(step=step), plan.samples, plan.columns, 0.1, heads, lengths=plan.lengths)
        half = len(plan.samples) // 2
        assert np.array_equal(plan.mask(0, "attention").words[:half], mask.words[:half])


@SEARCH
@given(seed=EXTENT, step=EXTENT, branch=EXTENT, layer=EXTENT, site=st.sampled_from(list(SITES)) | STRANGE)
def test_keys(seed, step, branch, layer, site) -> None:
    key = outcome(lambda: MaskKey(seed, step, branch, layer, site))
    if key is not None:
        assert key.derive() == reference.site_key(int(seed), int(step), int(branch), int(layer), SITES[site])


@pytest.mark.parametrize("edge", [2**32, 2**40, 2**63, 2**64, 2**64 + 1, -1, -(2**63)])
def test_nothing_wraps_around(edge: int) -> None:
    """Each limit is tested from outside: a value that only fits after wrapping must not be taken for the one it wraps to."""
    for name in ("step", "branch", "layer"):
        with pytest.raises(ConfigError, match=f"{name} must be"):
            MaskKey(**{name: edge})
    for call in (
        lambda: masks.element(KEY, [0], edge, 1, 0.1),
        lambda: masks.element(KEY, [0], 1, edge, 0.1),
        lambda: masks.element(KEY, [0], 1, 1, 0.1, heads=edge),
    ):
        with pytest.raises(ConfigError, match="must be an integer in"):
            call()
    if edge != 2**32:
        with pytest.raises(DataError, match="sample ids must"):
            masks.element(KEY, [edge], 1, 1, 0.1)
    with pytest.raises(DataError, match="lengths must"):
        masks.span(KEY, [0], [edge], 0.1)


def _arrays() -> list[np.ndarray]:
    """Arrays that overlap, do not fit, cannot be written, or are of the wrong kind."""
    shared = np.zeros(256, np.uint8)
    frozen = np.zeros(4, np.uint32)
    frozen.flags.writeable = False
    found = [shared[:size].view(dtype) for dtype in ("u1", "u4", "u8", "i8", "u2", "f4") for size in (0, 8, 16, 64)]
    found += [shared[64:128].view("u4"), shared[:128].view("u4").reshape(2, 16), shared[1:9].view("u8"), frozen]
    found += [np.zeros(8, "u4")[::2], np.zeros((3, 5), "u8"), np.zeros((2, 4), "u8"), np.zeros(2, ">u4"), np.zeros(3)]
    found += [np.zeros(2, object), np.zeros((1, 1, 1, 1), "u4"), np.full(2, 2**63, "u8"), np.full(2, 2**32 - 1, "u4")]
    found += [
        np.full((1, 5), 2**64 - 1, "u8"),
        np.array([[0, 0, 1, 1, 5]], "u8"),
        np.full(2, -1),
        np.full(4, np.nan, "f4"),
    ]
    found += [
        np.ones(shape, "u1") for shape in ((1, 2, 3), (2, 1, 2), (1, 1, 2, 3), (1, 2, 2, 3), (0, 1, 2, 3), (1, 1, 2, 0))
    ]
    found += [np.zeros((1, 2**40, 0), "u1"), np.zeros((2**40, 1, 0), "u1"), np.zeros((1, 1, 2**40, 0), "u1")]
    found += [
        np.zeros(shape, dtype) for dtype in ("u4", "i8") for shape in ((1, 2, 3), (2, 2, 2), (1, 0, 3), (5, 1, 4))
    ]
    found += [np.zeros(shape, "i8") for shape in ((1, 3), (2, 2), (1, 4), (2, 3))]
    found += [np.array(values) for values in ([0, 3, 5], [1, 0], [-1, 1], [0, 2], [5, 0], [2**62, 5], [2**63 - 1] * 3)]
    found += [np.array(values, "i4") for values in ([0, 3, 5], [7, 7, 7, 7, 7])]
    found += [np.array(values, "u4") for values in ([3, 2, 1], [2, 2], [1], [2**31, 5, 9])]
    return found


class Pick(int):
    """The number of one of the arrays, so that it is told apart from other numbers."""


ARRAY = st.integers(0, len(_arrays()) - 1).map(Pick)
RAW = st.integers(0, 5) | WHOLE | STRANGE
SMALL = st.integers(0, 5) | st.integers(0, 5) | RAW
SITE = st.just((0, 0, 0, 0, 0)) | st.tuples(SMALL, SMALL, SMALL, SMALL, SMALL) | STRANGE


def typed(*dtypes: str):
    """Most often an array of one of these types."""
    fitting = [Pick(n) for n, array in enumerate(_arrays()) if array.dtype in dtypes]
    return st.sampled_from(fitting) | st.sampled_from(fitting) | ARRAY


IDS, WORDS, SIGNED, BYTES, FLOATS = typed("u8"), typed("u4"), typed("i8"), typed("u1"), typed("f4", "u2")
DRAWN = st.tuples(SMALL, SMALL, st.booleans() | RAW)


def shaped(dims: int, *dtypes: str):
    """Most often an array of so many axes and one of these types."""
    fitting = [Pick(n) for n, array in enumerate(_arrays()) if array.ndim == dims and array.dtype in dtypes]
    return st.sampled_from(fitting) | st.sampled_from(fitting) | ARRAY


NUMBERS, COUNTS, TOKENS = shaped(1, "i8"), shaped(1, "u4"), shaped(1, "i8", "i4")
PAIR = st.tuples(SMALL, SMALL)
FLAG = st.booleans() | st.booleans() | RAW
CORE = {
    "element": (SITE, IDS, SMALL, SMALL, SMALL, SMALL, WORDS | BYTES),
    "column": (SITE, IDS, WORDS | st.none(), SMALL, SMALL, SMALL, WORDS),
    "span": (SITE, IDS, WORDS, SMALL, SMALL, SMALL, WORDS),
    "unpack": (WORDS, SMALL, BYTES),
    "plan": (SMALL, SMALL, IDS, IDS, IDS, WORDS, SMALL, WORDS, WORDS),
    "dropout": (st.tuples(SMALL, SMALL), SIGNED, SIGNED, SMALL, RATE, st.tuples(FLOATS, FLOATS)),
    "dropout_rows": (BYTES, RATE, st.tuples(FLOATS, FLOATS)),
    "derive_key": (SITE,),
    "keep_rows": (shaped(3, "u1"), COUNTS, SMALL, FLAG, FLAG, st.tuples(FLOATS, FLOATS)),
    "seen_keys": (shaped(4, "u1"), shaped(3, "u4")),
    "block_mask": (
        *(shaped(4, "u1"), shaped(3, "u4"), shaped(4, "u1"), FLAG, PAIR, PAIR, SMALL),
        *(shaped(1, "u4", "u2"), shaped(1, "u1")),
    ),
    "order": (SMALL, SMALL, SMALL, SMALL, NUMBERS),
    "order_at": (SMALL, SMALL, SMALL, SMALL, FLAG),
    "schedule": (DRAWN, st.tuples(SMALL, SMALL, SMALL, SMALL), COUNTS, SMALL, NUMBERS, NUMBERS),
    "schedule_counts": (DRAWN, st.tuples(SMALL, SMALL, SMALL, SMALL), COUNTS, NUMBERS),
    "share": (NUMBERS, COUNTS, shaped(3, "i8")),
    "pack": (TOKENS, SMALL, SMALL),
    "extent": (NUMBERS, SMALL, NUMBERS, SMALL),
    "gather": (
        *(st.tuples(TOKENS, st.none() | TOKENS, st.none() | TOKENS), NUMBERS),
        st.tuples(NUMBERS, st.none() | st.tuples(NUMBERS, NUMBERS), st.none() | NUMBERS),
        *(st.tuples(SMALL, SMALL, SMALL), st.tuples(FLAG, FLAG, FLAG, FLAG)),
        *(st.tuples(st.none() | NUMBERS, NUMBERS | shaped(2, "i8")), shaped(3, "i8")),
    ),
}


@pytest.mark.parametrize("name", CORE)
def test_the_core_itself(name: str) -> None:
    """Whatever it is called with, the extension raises an ``Exception`` (a panic is none) or returns."""

    def chosen(value, arrays):
        if isinstance(value, tuple):
            return tuple(chosen(part, arrays) for part in value)
        return arrays[value] if isinstance(value, Pick) else value

    @SEARCH
    @given(st.tuples(*CORE[name]))
    def search(drawn) -> None:
        arrays = _arrays()
        with contextlib.suppress(Exception):
            getattr(_core, name)(*chosen(drawn, arrays))

    search()


@pytest.mark.parametrize("sign", [1, -1])
def test_integers_too_long_to_write(sign: int) -> None:
    value = sign * 10**5000
    for call in (
        lambda: MaskKey(seed=value),
        lambda: masks.column(KEY, [0], value, 0.1),
        lambda: hk.AttentionDrop(position="dropkey", pattern="column", rate=value),
        lambda: Order(value, 0, 5),
    ):
        with pytest.raises(ConfigError, match="got an integer of 16610 bits"):
            call()


def test_arrays_that_lie_otherwise_are_refused() -> None:
    """Columns first, or not aligned: read in the order of memory their numbers would be other ones."""
    hidden, out = np.arange(12, dtype=np.float32).reshape(3, 4), np.empty((3, 4), np.float32)
    keep = np.ones(3, np.uint8)
    _core.dropout_rows(keep, 1.0, (hidden, out))
    assert (out == hidden).all()
    odd = np.frombuffer(bytes(49), np.float32, count=12, offset=1).reshape(3, 4)
    for bad in ((np.asfortranarray(hidden), out), (hidden, np.asfortranarray(out)), (odd, out)):
        with pytest.raises(DataError, match=r"row by row \(got (strides of \[4, 12\] bytes|misaligned memory)\)"):
            _core.dropout_rows(keep, 1.0, bad)


@pytest.mark.parametrize("pattern", [0, 3, 9])
def test_what_is_planned_is_said(pattern: int) -> None:
    entries = np.array([[0, 0, pattern, 1, 100]], np.uint64)
    with pytest.raises(ConfigError, match=rf"got pattern {pattern}\)"):
        masks.fill_plan(0, 0, entries, np.array([1]), np.array([0]), np.array([4]), 4)
