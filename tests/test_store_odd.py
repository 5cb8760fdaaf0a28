"""Stores of what is damaged, odd or nowhere aligned: the right rows, or an error that says what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hiddenkey_rs as hk
from hiddenkey_rs import DataError, TokenStore
from hiddenkey_rs.batches.pad import Gatherer, Layout, Source
from test_store import LABELS, ROWS, rows_of, table


def test_an_attention_mask_beside_arrays(tmp_path: Path) -> None:
    flat = np.arange(1, 6), np.array([0, 3, 5])
    store = TokenStore(flat, token_columns={"attention_mask": np.ones(5, int)})
    assert store.column_names == ["input_ids", "sample_id"]
    store.save(tmp_path / "s.arrow").verify()
    with pytest.raises(DataError, match=r"attention_mask hides a token \(got 0 in row 1\)"):
        TokenStore(flat, token_columns={"attention_mask": [1, 1, 1, 0, 1]})
    with pytest.raises(DataError, match=r"attention_mask has one number a token \(got it among"):
        TokenStore(flat, row_columns={"attention_mask": [1, 1]})


def test_a_column_that_nobody_wants_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "s.parquet"
    pq.write_table(table(odd=pa.array(["a" * 50] * 4)), file, compression="none", use_dictionary=False)
    place = pq.ParquetFile(file).metadata.row_group(0)
    odd = next(place.column(n) for n in range(place.num_columns) if place.column(n).path_in_schema == "odd")
    content = bytearray(file.read_bytes())
    content[odd.data_page_offset : odd.data_page_offset + 40] = b"\xff" * 40
    file.write_bytes(content)
    with pytest.raises(DataError, match="a store cannot be read"):
        TokenStore(file)
    store = TokenStore(file, columns=["labels"])
    assert rows_of(store) == ROWS
    assert store.row_columns["labels"].tolist() == LABELS
    assert store.ignored == ("token_type_ids", "odd")
    pq.write_table(table(), file)
    with pytest.raises(DataError, match=r"there is no such column \(got 'label'\); did you mean 'labels'"):
        TokenStore(file, columns=["label"])


@pytest.mark.parametrize("error", [pa.lib.ArrowNotImplementedError, pa.lib.ArrowTypeError, pa.lib.ArrowKeyError])
def test_all_of_arrows_errors_are_named(error: type[Exception], tmp_path: Path, monkeypatch) -> None:
    """They are kinds of NotImplementedError, TypeError and KeyError."""
    pq.write_table(table(), tmp_path / "s.parquet")

    def read(*_, **__):
        raise error("of another kind")

    monkeypatch.setattr(pq, "read_table", read)
    with pytest.raises(DataError, match=r"a store cannot be read .*of another kind"):
        TokenStore(tmp_path / "s.parquet")


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_mapped_is_looked_at(stream: bool, tmp_path: Path) -> None:
    """A length beyond its buffer: Arrow maps such a file without a word, and whoever reads on reads past its end."""
    file = tmp_path / "s.arrow"
    columns = pa.table({"input_ids": [[1] * 77], "number": [1]})
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(file), "wb") as sink, make(sink, columns.schema) as writer:
        writer.write_table(columns)
    assert len(TokenStore(file).values) == 77
    length = np.array([77, 0], np.int64).tobytes()  # of the list's values, of which none is null
    content = file.read_bytes()
    assert content.count(length) == 1
    file.write_bytes(content.replace(length, np.array([77 << 30, 0], np.int64).tobytes()))
    with pytest.raises(DataError, match=r"a store cannot be read .*too small"):
        TokenStore(file)


def test_arrays_that_begin_anywhere() -> None:
    """Cut out of bytes, an array need not be aligned: the core reads no such memory, so it is copied."""

    def odd(numbers: list[int], dtype) -> np.ndarray:
        array = np.frombuffer(b"??" + np.array(numbers, dtype).tobytes(), dtype, offset=2)
        assert not array.flags.aligned
        return array

    flat = odd([1, 2, 3, 4, 5], np.int32), odd([0, 3, 5], np.int64)
    store = TokenStore(flat, row_columns={"labels": odd([1, 0], np.int64)}, sample_ids=odd([7, 9], np.int64))
    batch = hk.Collator()(store.__getitems__([1, 0]))
    assert batch["input_ids"].tolist() == [[4, 5, 0], [1, 2, 3]]
    assert batch["sample_id"].tolist() == [9, 7]
    assert hk.pack(odd([3, 2], np.int64), 5).documents.tolist() == [0, 1]
    assert len(hk.BatchSampler(odd([3, 2], np.uint32), batch_size=1)) == 2
    assert len(list(hk.BatchSampler(odd([3, 2], np.int32), batch_size=1))) == 2
    ids = odd([3, 4], np.uint64)
    assert hk.masks.element(hk.MaskKey(), ids, 2, 8, 0.5) == hk.masks.element(hk.MaskKey(), [3, 4], 2, 8, 0.5)
    with pytest.raises(
        DataError, match=r"tokens must be a contiguous array .*got an array of int32, which is not aligned"
    ):
        Source(flat[0], np.array([0, 5]))
    rows = Gatherer(Source(store.values, store.offsets), Layout()).pad(odd([1], np.int64))
    assert rows.arrays()["input_ids"].tolist() == [[4, 5]]
