"""A store holds what its source holds, without a copy where Arrow's bytes lie in one piece, and refuses what is damaged."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenkey_rs import ConfigError, DataError
from hiddenkey_rs.loading.digest import BLOCK
from hiddenkey_rs.loading.store import TokenStore

datasets = pytest.importorskip("datasets")

ROWS = [[5, 6, 7], [8], [], [9, 10, 11, 12]]
TYPES = [[0, 1, 1], [0], [], [0, 0, 1, 1]]
LABELS = [1, 0, 1, 0]


def rows_of(store: TokenStore, name: str = "input_ids") -> list[list[int]]:
    flat = store.values if name == "input_ids" else store.token_columns[name]
    return [flat[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


def table(rows: list = ROWS, value: pa.DataType | None = None, **columns) -> pa.Table:
    ids = pa.array(rows, pa.list_(value or pa.int32()))
    return pa.table(
        {"input_ids": ids, "token_type_ids": pa.array(TYPES, pa.list_(pa.int8())), "labels": LABELS, **columns}
    )


def shares(array: np.ndarray, buffer: pa.Buffer) -> bool:
    return buffer.address <= array.ctypes.data < buffer.address + buffer.size


# -- views --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [pa.int32(), pa.int64()])
@pytest.mark.parametrize("shape", [pa.list_, pa.large_list])
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (1, 3), (3, 4), (2, 3)])
def test_list_columns_are_views(value: pa.DataType, shape, start: int, stop: int) -> None:
    column = pa.array(ROWS, shape(value))
    store = TokenStore(column.slice(start, stop - start))
    assert rows_of(store) == ROWS[start:stop]
    assert store.values.dtype == value.to_pandas_dtype()
    assert store.offsets.dtype == np.int64
    assert store.offsets[0] == 0
    assert store.lengths.tolist() == [len(row) for row in ROWS[start:stop]]
    if len(store.values):
        assert shares(store.values, column.values.buffers()[1])


def test_a_list_of_lists_of_equal_lengths_is_a_view() -> None:
    column = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2))
    store = TokenStore(column.slice(1))
    assert rows_of(store) == [[3, 4], [5, 6]]
    assert shares(store.values, column.values.buffers()[1])


@pytest.mark.parametrize("value", [pa.int8(), pa.int16(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()])
def test_other_integers_are_widened(value: pa.DataType) -> None:
    store = TokenStore(pa.array(ROWS, pa.list_(value)))
    assert rows_of(store) == ROWS
    assert store.values.dtype == (np.int64 if value in (pa.uint32(), pa.uint64()) else np.int32)


def test_chunks_become_one_piece() -> None:
    column = pa.array(ROWS, pa.list_(pa.int32()))
    chunked = pa.chunked_array([column.slice(1, 2), column.slice(0, 1), column.slice(0, 0), column.slice(3)])
    assert rows_of(TokenStore(chunked)) == [*ROWS[1:3], ROWS[0], ROWS[3]]
    alone = pa.chunked_array([column])
    assert shares(TokenStore(alone).values, column.values.buffers()[1]), "one chunk is no copy"


def test_numpy_pairs_are_views() -> None:
    values = np.arange(100, 110, dtype=np.int32)
    store = TokenStore((values, np.array([2, 5, 5, 10], np.uint16)))
    assert rows_of(store) == [[102, 103, 104], [], [105, 106, 107, 108, 109]]
    assert np.shares_memory(store.values, values)
    offsets = np.array([0, 10])
    assert TokenStore((values, offsets)).offsets is offsets
    strided = TokenStore((np.arange(20)[::2], [0, 10]))
    assert rows_of(strided) == [list(range(0, 20, 2))]
    assert strided.values.flags.c_contiguous


def test_an_example_is_a_mapping() -> None:
    store = TokenStore(table(score=[0.5, 1.5, 2.5, 3.5]), sample_ids=[70, 80, 90, 2**40 - 1])
    last = store[3]
    assert {name: getattr(value, "tolist", lambda v=value: v)() for name, value in last.items()} == {
        "input_ids": ROWS[3],
        "token_type_ids": TYPES[3],
        "labels": 0,
        "score": 3.5,
        "sample_id": 2**40 - 1,
    }
    assert list(last) == store.column_names
    assert type(last["labels"]) is int
    assert TokenStore(table())[2]["sample_id"] == 2
    assert len(list(iter(store))) == 4, "a plain loop ends"
    for row in (4, -1):
        with pytest.raises(IndexError, match=rf"outside 0\.\.3 \(got {row}\)"):
            store[row]


def test_a_batch_names_its_rows() -> None:
    store = TokenStore(table())
    batch = store.__getitems__([3, 1, -1])
    assert batch.store is store
    assert batch.rows.tolist() == [3, 1, -1]


# -- columns ------------------------------------------------------------------------------------------------------


def test_columns_come_along() -> None:
    given = table(
        text=["a", "b", "c", "d"], truth=[True, False, True, True], token_labels=[[-100, 6, 7], [8], [], [1] * 4]
    )
    store = TokenStore(given)
    assert set(store.token_columns) == {"token_type_ids", "token_labels"}
    assert rows_of(store, "token_type_ids") == TYPES
    assert store.token_columns["token_type_ids"].dtype == np.int32
    assert rows_of(store, "token_labels")[0] == [-100, 6, 7]
    assert store.row_columns["labels"].tolist() == LABELS
    assert store.row_columns["truth"].tolist() == [1, 0, 1, 1]
    assert (store.ignored, store.sample_ids) == (("text",), None)
    few = TokenStore(given, columns=["labels"])
    assert (list(few.token_columns), list(few.row_columns)) == ([], ["labels"])
    assert few.ignored == ("token_type_ids", "text", "truth", "token_labels")
    assert rows_of(TokenStore(given, column="token_type_ids", columns=[])) == TYPES


def test_an_attention_mask_is_left_out_once_it_hides_nothing() -> None:
    ones = pa.array([[1] * len(row) for row in ROWS], pa.list_(pa.int8()))
    store = TokenStore(table(attention_mask=ones))
    assert "attention_mask" not in [*store.token_columns, *store.ignored]
    with pytest.raises(DataError, match=r"attention_mask hides a token \(got 0 in row 3\); tokenise without padding"):
        TokenStore(table(attention_mask=[[1, 1, 1], [1], [], [1, 1, 1, 0]]))


def test_sample_ids_of_a_column() -> None:
    store = TokenStore(table(sample_id=[9, 8, 7, 6]))
    assert store.sample_ids is not None
    assert store.sample_ids.tolist() == [9, 8, 7, 6]
    assert "sample_id" not in store.row_columns
    assert store[1]["sample_id"] == 8
    for ids, message in (
        ([1, 2, 3, -1], r"outside 0..2\*\*40 - 1 \(got -1 in row 3\)"),
        ([1, 2**40, 3, 4], rf"got {2**40} in row 1"),
        ([1, 2, 3], "got 3 for 4 rows"),
        ([1.0, 2.0, 3.0, 4.0], r"sample ids must be integers \(got float64"),
        ([1.0, float("nan"), 3.0, 4.0], r"not finite \(got nan in row 1\)"),
    ):
        with pytest.raises(DataError, match=message):
            TokenStore(table(), sample_ids=ids)


def test_columns_beside_arrays() -> None:
    pair = (np.arange(8), [0, 3, 4, 4, 8])
    store = TokenStore(
        pair,
        token_columns={"labels": np.arange(8, dtype=np.int16), "token_type_ids": pa.array(TYPES)},
        row_columns={"score": np.ones(4, np.float16), "sample_id": [4, 3, 2, 1]},
    )
    assert store.token_columns["labels"].dtype == np.int32
    assert rows_of(store, "token_type_ids") == TYPES
    assert store.row_columns["score"].dtype == np.float32
    assert store.sample_ids is not None
    with pytest.raises(DataError, match=r"labels must have one number a token \(got 7 for 8 tokens\)"):
        TokenStore(pair, token_columns={"labels": np.arange(7)})
    with pytest.raises(ConfigError, match=r"only a table.*got columns=\['labels'\]"):
        TokenStore(pair, columns=["labels"])


# -- data sets ----------------------------------------------------------------------------------------------------


def test_data_sets_with_and_without_an_index() -> None:
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "labels": datasets.ClassLabel(2),
            "text": datasets.Value("string"),
        }
    )
    data = datasets.Dataset.from_dict({"input_ids": ROWS, "labels": LABELS, "text": list("abcd")}, features=features)
    whole = TokenStore(data)
    assert (rows_of(whole), whole.row_columns["labels"].tolist(), whole.ignored) == (ROWS, LABELS, ("text",))
    assert shares(whole.values, data.data.column("input_ids").chunk(0).values.buffers()[1])
    for view, order in ((data.select([3, 0, 3]), [3, 0, 3]), (data.select(range(1, 3)), [1, 2])):
        store = TokenStore(view)
        assert rows_of(store) == [ROWS[n] for n in order]
        assert store.row_columns["labels"].tolist() == [LABELS[n] for n in order]
    shuffled = data.shuffle(seed=1)
    assert rows_of(TokenStore(shuffled)) == shuffled["input_ids"][:]
    joined = datasets.concatenate_datasets([data, shuffled])
    assert rows_of(TokenStore(joined)) == ROWS + shuffled["input_ids"][:]


def test_a_data_set_on_disk_and_of_fixed_lengths(tmp_path: Path) -> None:
    fixed = datasets.Features({"input_ids": datasets.List(datasets.Value("int64"), length=2)})
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]]}, features=fixed)
    assert rows_of(TokenStore(data.select([2, 0]))) == [[5, 6], [1, 2]]
    data.save_to_disk(tmp_path / "set")
    again = datasets.load_from_disk(tmp_path / "set")
    assert rows_of(TokenStore(again)) == [[1, 2], [3, 4], [5, 6]]
    stream = next((tmp_path / "set").glob("*.arrow"))
    assert rows_of(TokenStore(stream)) == [[1, 2], [3, 4], [5, 6]], "the stream format, by its path"
    with pytest.raises(DataError, match=r"cannot be made of this \(got DatasetDict\); choose one of its splits"):
        TokenStore(datasets.DatasetDict({"train": data}))
    with pytest.raises(DataError, match=r"there is no such column \(got 'input_id'\); did you mean 'input_ids'"):
        TokenStore(data, column="input_id")


# -- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> TokenStore:
    return TokenStore(table(score=[0.5, 1.5, 2.5, 3.5]), sample_ids=[4, 3, 2, 1]).save(tmp_path / "s.arrow")


def test_a_saved_store_is_mapped_and_the_same(saved: TokenStore, tmp_path: Path) -> None:
    fresh = TokenStore(table(score=[0.5, 1.5, 2.5, 3.5]), sample_ids=[4, 3, 2, 1])
    before = pa.total_allocated_bytes()
    again = TokenStore(saved.path)
    assert pa.total_allocated_bytes() == before, "mapped, not read"
    for store in (saved, again):
        assert rows_of(store) == ROWS
        assert rows_of(store, "token_type_ids") == TYPES
        assert {name: column.tolist() for name, column in store.row_columns.items()} == {
            "labels": LABELS,
            "score": [0.5, 1.5, 2.5, 3.5],
        }
        assert store.sample_ids.tolist() == [4, 3, 2, 1]
        assert "digest" in vars(store), "known from the file"
        assert (store.digest, store.limits) == (fresh.digest, (5, 12))
        for array in (store.values, store.offsets, store.token_columns["token_type_ids"], store.sample_ids):
            assert not array.flags.owndata
            assert not array.flags.writeable
        store.verify()
    assert [path.name for path in tmp_path.iterdir()] == ["s.arrow"], "no temporary is left"
    assert pa.ipc.open_file(saved.path).read_all().column_names[:3] == ["input_ids", "token_type_ids", "labels"]


@pytest.mark.parametrize("suffix", [".arrow", ".feather", ".parquet"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_files_of_others(suffix: str, chunk: int, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(table(), path, row_group_size=chunk)
    else:
        with pa.ipc.new_file(path, table().schema) as writer:
            writer.write_table(table(), max_chunksize=chunk)
    store = TokenStore(str(path))
    assert rows_of(store) == ROWS
    assert rows_of(store, "token_type_ids") == TYPES
    assert store.digest == TokenStore(table()).digest
    assert rows_of(pickle.loads(pickle.dumps(store))) == ROWS


def test_a_header_does_not_outlive_its_rows(saved: TokenStore, tmp_path: Path) -> None:
    """Whoever reads the file with Arrow, changes rows and writes it again gets a new digest."""
    whole = pa.ipc.open_file(saved.path).read_all()
    for name, other in (("a", whole.take([1, 0, 2, 3])), ("b", whole.slice(1))):
        with pa.ipc.new_file(tmp_path / f"{name}.arrow", other.schema) as writer:
            writer.write_table(other)
        assert TokenStore(tmp_path / f"{name}.arrow").digest not in (saved.digest,)
    other = TokenStore(saved.path, column="token_type_ids")
    assert (other.limits, rows_of(other), other.ignored) == ((0, 1), TYPES, ("input_ids",))
    assert TokenStore(saved.path, columns=["labels"]).digest != saved.digest
    assert TokenStore(saved.path, row_columns={"more": LABELS}).digest != saved.digest


def test_damage_is_found(saved: TokenStore, tmp_path: Path) -> None:
    whole = saved.path.read_bytes()
    place = whole.index(np.array(ROWS[0], np.int32).tobytes())
    path = tmp_path / "damaged.arrow"
    path.write_bytes(whole[:place] + b"\x55" + whole[place + 1 :])
    damaged = TokenStore(path)
    with pytest.raises(DataError, match=r"a store is damaged \(got digest .*make it again"):
        damaged.verify()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cannot be read \(got '.*damaged.arrow'.*truncated or foreign"):
            TokenStore(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.arrow", None, r"does not exist \(got '.*none.arrow'"),
        ("s.txt", b"x", r"unknown kind of store \(got '.*s.txt'\); use one of .arrow, .feather, .ipc, .parquet"),
        ("s.parquet", b"PAR1 and then nothing", r"cannot be read \(got '.*s.parquet'"),
        ("s.parquet", b"ARROW1\0\0", r"not what its suffix says \(got '.*s.parquet' with no Parquet inside"),
        ("s.arrow", b"PAR1xxxx", "with Parquet inside"),
        ("s.arrow", b"hello, world, this is text", "cannot be read"),
    ],
)
def test_files_that_are_none(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        TokenStore(tmp_path / name)
    with pytest.raises(DataError, match=r"is a folder"):
        TokenStore(tmp_path)


def test_places_that_cannot_be_written(saved: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"saved as an Arrow file \(got '.*s.parquet'\)"):
        saved.save(tmp_path / "s.parquet")
    with pytest.raises(DataError, match=r"cannot be written \(got '.*nowhere/s.arrow'.*choose another place"):
        saved.save(tmp_path / "nowhere" / "s.arrow")
    again = saved.save(saved.path)
    assert rows_of(again) == rows_of(saved) == ROWS, "over itself: the old mapping lives on"


def test_a_write_that_stops_leaves_the_old_file(saved: TokenStore, tmp_path: Path) -> None:
    """SIGKILL in the middle of a save."""
    code = (
        "import os, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from hiddenkey_rs.loading.store import TokenStore\n"
        "Path.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "TokenStore((np.arange(9), [0, 9])).save(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved.path)], check=False)
    assert done.returncode == -9
    assert rows_of(TokenStore(saved.path)) == ROWS


# -- workers ------------------------------------------------------------------------------------------------------


def told(store: TokenStore, answers) -> None:
    answers.put((rows_of(store), store.digest, store.values.flags.owndata))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_stores_reach_workers(method: str, saved: TokenStore) -> None:
    context = multiprocessing.get_context(method)
    plain = TokenStore(table())
    for store, copied in ((saved, False), (plain, method != "fork")):
        answers = context.SimpleQueue()
        worker = context.Process(target=told, args=(store, answers))
        worker.start()
        assert answers.get() == (ROWS, store.digest, copied)
        worker.join()


def test_pickles_are_small_and_checked(saved: TokenStore, tmp_path: Path) -> None:
    big = TokenStore((np.arange(10**6), np.arange(0, 10**6 + 1, 10))).save(tmp_path / "big.arrow")
    packed = pickle.dumps(big)
    assert len(packed) < 1000
    assert pickle.loads(packed).digest == big.digest
    chosen = pickle.loads(pickle.dumps(TokenStore(saved.path, columns=["labels"], sample_ids=[6, 7, 8, 9])))
    assert (list(chosen.row_columns), chosen.sample_ids.tolist()) == (["labels"], [6, 7, 8, 9])
    TokenStore(table()).save(big.path)
    with pytest.raises(DataError, match=r"changed while it was in use \(got '.*big.arrow'"):
        pickle.loads(packed)
    big.path.unlink()
    with pytest.raises(DataError, match=r"file is gone \(got '.*big.arrow'"):
        pickle.loads(packed)


# -- digest and vocabulary ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), min_size=1, max_size=8), st.data())
def test_the_digest_is_the_content(rows: list[list[int]], data: st.DataObject) -> None:
    narrow = pa.array(rows, pa.list_(pa.int32()))
    digest = TokenStore(narrow).digest
    assert digest == TokenStore(pa.array(rows, pa.large_list(pa.int64()))).digest
    cut = data.draw(st.integers(0, len(rows)))
    assert digest == TokenStore(pa.chunked_array([narrow.slice(0, cut), narrow.slice(cut)])).digest
    tokens = sum(map(len, rows))
    if tokens:
        store = TokenStore(narrow)
        values = store.values.copy()
        values[data.draw(st.integers(0, tokens - 1))] ^= 1 << data.draw(st.integers(0, 30))
        assert TokenStore((values, store.offsets)).digest != digest
    assert TokenStore((TokenStore(narrow).values, [0, *np.cumsum([len(row) for row in rows]), tokens])).digest != digest


def test_the_digest_spans_blocks_and_columns() -> None:
    values = np.arange(2 * BLOCK + 3, dtype=np.int64)
    offsets = [0, 7, len(values)]
    store = TokenStore((values, offsets))
    seen = {store.digest}
    for place in (0, BLOCK - 1, BLOCK, 2 * BLOCK, 2 * BLOCK + 2):
        other = values.copy()
        other[place] += 1 << 40
        seen.add(TokenStore((other, offsets)).digest)
    swapped = np.concatenate([values[BLOCK : 2 * BLOCK], values[:BLOCK], values[2 * BLOCK :]])
    seen.add(TokenStore((swapped, offsets)).digest)
    pair = (values, offsets)
    for extra in (
        {"row_columns": {"a": [1, 2]}},
        {"row_columns": {"b": [1, 2]}},
        {"row_columns": {"a": [1.0, 2.0]}},
        {"token_columns": {"a": values}},
        {"sample_ids": [1, 2]},
    ):
        seen.add(TokenStore(pair, **extra).digest)
    assert len(seen) == 12
    assert all(len(digest) == 32 for digest in seen)


def test_the_digest_is_pinned() -> None:
    """Files and checkpoints hold it: it must stay what it was, of several blocks, too."""
    assert TokenStore((np.arange(2**21 + 3), [0, 7, 2**21 + 3])).digest == "f3adbc50b696240a8a2c79d9d943e6b8"
    assert TokenStore((np.arange(5), [0, 2, 5])).digest == "4707ba16745f605ce90c065d350e2120"


def test_vocabulary() -> None:
    values = np.zeros(BLOCK + 10, np.int32)
    values[[BLOCK + 4, BLOCK + 8]] = 99, 120
    store = TokenStore((values, [0, BLOCK, BLOCK + 4, BLOCK + 7, BLOCK + 10]))
    store.check_vocabulary(121)
    with pytest.raises(DataError, match=r"beyond the vocabulary of 120 \(got 120, such ids begin in row 3\)"):
        store.check_vocabulary(120)
    with pytest.raises(DataError, match=r"of 99 \(got 120, such ids begin in row 2\); use the tokenizer that belongs"):
        store.check_vocabulary(99)
    with pytest.raises(ConfigError, match=r"vocabulary must be an integer .*got 2.5"):
        store.check_vocabulary(2.5)
    TokenStore(pa.array([[], []], pa.list_(pa.int32()))).check_vocabulary(1)


# -- hostile input ------------------------------------------------------------------------------------------------


def raw_list(offsets: list[int]) -> pa.Array:
    """Three tokens in two rows whose offsets were overwritten in a file: Arrow does not check them when it reads."""
    batch = pa.record_batch({"ids": pa.array([[1, 2], [3]], pa.list_(pa.int32()))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    sound, wrong = (np.array(ends, np.int32).tobytes() for ends in ([0, 2, 3], offsets))
    return pa.ipc.open_stream(sink.getvalue().to_pybytes().replace(sound, wrong)).read_all().column(0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (pa.array([], pa.list_(pa.int32())), r"a store needs examples \(got 0 rows\)"),
        (pa.chunked_array([], pa.list_(pa.int32())), "got 0 rows"),
        ((np.array([], np.int64), np.array([0])), "got 0 rows"),
        ((np.array([], np.int64), np.array([], np.int64)), r"there are no offsets \(got 0\)"),
        ((np.arange(5), [0, 3, 2, 5]), r"offsets go backwards \(got 3 then 2 at row 1\)"),
        ((np.arange(5), np.array([0, 3, 2, 5], np.uint8)), r"offsets go backwards \(got 3 then 2 at row 1\)"),
        ((np.arange(5), [0, 3, 6]), r"offsets lie outside the values \(got 6 with 5 values\)"),
        ((np.arange(5), [-1, 3, 5]), r"offsets lie outside the values \(got -1 with 5 values\)"),
        ((np.arange(5), [0, 3]), r"offsets end before the values do \(got 3 of 5 values\)"),
        ((np.arange(5.0), [0, 5]), r"values must be .*integers \(got float64"),
        ((np.array([1.0, np.nan]), [0, 2]), r"values must be .*integers \(got float64"),
        ((np.arange(6).reshape(2, 3), [0, 6]), r"got int64 of shape \(2, 3\)"),
        ((np.arange(5), [0.0, 5.0]), r"offsets must be .*integers \(got float64"),
        ((np.array([1, 2**64 - 1], np.uint64), [0, 2]), rf"exceeds 64 bits with sign \(got {2**64 - 1}\)"),
        ((["a", "b"], [0, 2]), "values must be .*integers"),
        (([[1], [2, 3]], [0, 2]), "values must be a one-dimensional array .*inhomogeneous"),
        ((np.array([3, -1, 4, -7]), [0, 1, 4]), r"must not be negative \(got -7, first in row 1\)"),
        (raw_list([0, 2, 1]), r"offsets go backwards \(got 2 then 1 at row 1\)"),
        (raw_list([0, 2, 9]), r"outside the values \(got 9 with 3 values\)"),
        (raw_list([-2, 2, 3]), r"outside the values \(got -2 with 3 values\)"),
        (pa.chunked_array([pa.array(ROWS), pa.array([[1], None])]), r"missing row \(got null in row 5\)"),
        (pa.chunked_array([pa.array(ROWS), pa.array([[1], [2, None]])]), r"missing token \(got null in row 5\)"),
        (pa.array([[1, None], [2], [3, None]]).slice(1), r"missing token \(got null in row 1\)"),
        (pa.array([[1.5], [2.0]]), r"a list column of integers \(got list<item: double>\); tokenise the text first"),
        (pa.array(["a text"]), r"\(got string\); tokenise the text first"),
        (pa.array([1, 2]), r"\(got int64\)"),
        (pa.array([[[1]], [[2]]]), r"\(got list<item: list<item: int64>>\)"),
        ([[1, 2], [3]], r"cannot be made of this \(got list\)"),
        (None, r"cannot be made of this \(got NoneType\)"),
    ],
)
def test_hostile_ids(source, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenStore(source)


def test_a_null_behind_the_slice_is_no_null() -> None:
    assert rows_of(TokenStore(pa.array([[1, None], [2], [3]]).slice(1))) == [[2], [3]]
    assert rows_of(TokenStore(pa.array([None, [2], [3]], pa.list_(pa.int32())).slice(1))) == [[2], [3]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"labels": [[1, 2, 3], [1], [], [1, 2]]},
            r"labels must be as long as the ids .*\(got 2 for 4 tokens in row 3\)",
        ),
        ({"labels": [1, 2, None, 4]}, r"labels has a missing value \(got null in row 2\)"),
        ({"labels": [1.0, 2.0, float("inf"), 4.0]}, r"labels is not finite \(got inf in row 2\)"),
        ({"labels": [[1, 2, 3], None, [], [1, 2, 3, 4]]}, r"labels has a missing row \(got null in row 1\)"),
    ],
)
def test_hostile_columns(columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenStore(table().drop_columns("labels").append_column("labels", pa.array(columns["labels"])))


def test_columns_of_one_name() -> None:
    twice = pa.table([pa.array(ROWS), pa.array(LABELS), pa.array(LABELS)], names=["input_ids", "labels", "labels"])
    with pytest.raises(DataError, match=r"two columns have one name \(got 'labels'\)"):
        TokenStore(twice)
    assert len(TokenStore(twice, columns=[])) == 4


def test_columns_that_do_not_fit() -> None:
    for arguments, message in (
        ({"columns": ["lables"]}, r"no such column \(got 'lables'\); did you mean 'labels'"),
        ({"columns": ["text"]}, r"text must be a column of numbers \(got string\)"),
        ({"row_columns": {"score": [1, 2, 3]}}, r"score must have one number a row \(got 3 for 4 rows\)"),
        ({"row_columns": {"score": ["a"] * 4}}, r"score must be one number a row \(got <U1"),
        ({"row_columns": {"token_type_ids": LABELS}}, r"a name that is taken \(got 'token_type_ids'\)"),
        ({"token_columns": {"labels": range(8)}}, r"a name that is taken \(got 'labels'\)"),
        ({"token_columns": {"sample_id": range(8)}}, r"a name that is taken \(got 'sample_id'\)"),
        ({"row_columns": {"input_ids": LABELS}}, r"a name that is taken \(got 'input_ids'\)"),
        ({"token_columns": {"x": np.ones(8)}}, r"x: values must be .*integers \(got float64"),
        ({"token_columns": {"x": pa.array(TYPES[:3])}}, r"x must have one number a row \(got 3 for 4 rows\)"),
    ):
        with pytest.raises(DataError, match=message):
            TokenStore(table(text=list("abcd")), **arguments)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-3, 12), max_size=6),
    st.lists(st.integers(-2, 8), max_size=6),
)
def test_any_pair_is_taken_or_named(values: list[int], offsets: list[int]) -> None:
    ids, ends = np.array(values, np.int64), np.array(offsets, np.int64)
    sound = len(ends) > 1 and ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] == len(ids)
    if sound and (ids[ends[0] :] >= 0).all():
        assert rows_of(TokenStore((ids, ends))) == [values[a:b] for a, b in itertools.pairwise(offsets)]
    else:
        with pytest.raises(DataError):
            TokenStore((ids, ends))


def test_a_pair_needs_no_arrow() -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from hiddenkey_rs import TokenStore, HiddenKeyError\n"
        "store = TokenStore(([1, 2, 3], [0, 1, 3]))\n"
        "assert store.digest and 'torch' not in sys.modules\n"
        "try: store.save('x.arrow')\n"
        "except HiddenKeyError as error: assert 'with its extra [train]' in str(error), error\n"
        "else: raise SystemExit('saved without pyarrow')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_repr_says_what_it_is(saved: TokenStore) -> None:
    assert repr(TokenStore(table())) == "TokenStore(4 rows, 8 tokens, token_type_ids, labels)"
    assert repr(saved).endswith("labels, score, sample_id, '" + str(saved.path) + "')")
