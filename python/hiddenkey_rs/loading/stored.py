"""Files of stores: read where Arrow reads them, written as ordinary Arrow IPC files.

A written file is one record batch, so that every column is one piece and is mapped without a copy. What the writer
knew of the content travels as metadata of that batch, not of the schema: a schema's metadata would go along when
somebody filters the table and writes it again, and speak of rows that are gone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .arrow import Array, arrow

ARROW, PARQUET = (".arrow", ".feather", ".ipc"), (".parquet", ".pq")
_FILE_MAGIC, _PARQUET_MAGIC = b"ARROW1", b"PAR1"
_KEY = b"hiddenkey"


class Stamp(NamedTuple):
    """A file as it was when it was opened."""

    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of ``path``; a :class:`DataError` where there is no such file."""
        try:
            status = path.stat()
        except OSError:
            raise DataError(f"a store's file is gone (got {str(path)!r}); keep it where it was opened") from None
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Header:
    """What the writer knew, so that the next reader need not touch every page to find it out.

    Attributes:
        digest: of the content. smallest, largest: the extreme ids.
        origin: what the content was made from, in the words of who made it.
    """

    digest: str
    smallest: int
    largest: int
    origin: str = ""


def read_file(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> tuple[Any, Header | None]:
    """The table of a file, and the header if :func:`write_file` wrote it.

    An Arrow file is memory-mapped (bytes are read when they are touched), Parquet is decoded into memory. Both of
    Arrow's own formats are known: the file (also called Feather) and the stream (what ``datasets`` caches).

    Args:
        columns: those that will be looked at. The others are in the table by their names; Parquet does not decode them.

    Raises:
        DataError: missing, an unknown suffix, another format than the suffix says, truncated or damaged.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise DataError(f"a store's file {what} (got {str(file)!r}); give an Arrow or Parquet file")
    if file.suffix not in ARROW + PARQUET:
        raise DataError(f"unknown kind of store (got {str(file)!r}); use one of {', '.join(ARROW + PARQUET)}")
    pa = arrow()
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
        if (start[:4] == _PARQUET_MAGIC) != (file.suffix in PARQUET):
            kind = "Parquet" if start[:4] == _PARQUET_MAGIC else "no Parquet"
            raise DataError(f"a file is not what its suffix says (got {str(file)!r} with {kind} inside); rename it")
        if file.suffix in PARQUET:
            return _parquet_table(file, columns), None
        if start[:6] == _FILE_MAGIC:
            table, header = _file_table(pa.ipc.open_file(pa.memory_map(str(file))))
        else:
            table, header = pa.ipc.open_stream(pa.memory_map(str(file))).read_all(), None
        table.validate()  # what is mapped was not looked at: buffers may be shorter than the lengths say
        return table, header
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        pa.lib.ArrowException,
    ) as error:  # not all of Arrow's errors are kinds of the first two
        text = " ".join(str(error).split())
        raise DataError(
            f"a store cannot be read (got {str(file)!r}: {text}); it is truncated or foreign, make it again"
        ) from None


def write_file(
    path: Path, offsets: Array, lists: Mapping[str, Array], numbers: Mapping[str, Array], header: Header
) -> None:
    """Write list columns of equal ``offsets`` and columns of numbers: a whole new file or none, whatever happens meanwhile."""
    if path.suffix != ARROW[0]:
        raise DataError(f"a store is saved as an Arrow file (got {str(path)!r}); name it *{ARROW[0]}")
    pa = arrow()
    ends = pa.array(offsets)
    columns = {name: pa.LargeListArray.from_arrays(ends, pa.array(values)) for name, values in lists.items()}
    columns |= {name: pa.array(values) for name, values in numbers.items()}
    batch = pa.record_batch(columns)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch, custom_metadata={_KEY: json.dumps(asdict(header))})
        with temporary.open("r+b") as written:  # Windows flushes nothing that is open for reading alone
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"the store cannot be written (got {str(path)!r}: {error.strerror or error}); choose another place"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _parquet_table(file: Path, columns: Sequence[str] | None) -> Any:
    """The table; a column that nobody wants stands there by its name, empty, so that it may be of any kind or damaged."""
    parquet, pa = arrow("pyarrow.parquet"), arrow()
    names = parquet.read_schema(file, memory_map=True).names
    wanted = None if columns is None else set(columns)
    if wanted is None or not wanted <= set(names) or len(set(names)) < len(names):
        return parquet.read_table(file, memory_map=True)  # whoever chose the columns says what is wrong with them
    table = parquet.read_table(file, memory_map=True, columns=sorted(wanted))
    nothing = pa.nulls(len(table))
    return pa.table({name: table.column(name) if name in wanted else nothing for name in names})


def _file_table(reader: Any) -> tuple[Any, Header | None]:
    if reader.num_record_batches != 1:
        return reader.read_all(), None
    batch, metadata = reader.get_batch_with_custom_metadata(0)
    text = (metadata or {}).get(_KEY)
    table = arrow().Table.from_batches([batch])
    try:
        return table, None if text is None else Header(**json.loads(text))
    except (TypeError, ValueError):
        return table, None  # another version's: as good as none
