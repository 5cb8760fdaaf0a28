"""Text to a store, with the model's own tokenizer: in parallel, with progress, and once.

Work is spread over processes, not over the tokenizer's own threads: of the time that a fast tokenizer takes for short
texts a third is spent on turning its answer into Python lists, which only one thread of a process can do, and slow
tokenizers have no threads at all. A process keeps that third to itself, and sends back arrays.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .arrow import Array
from .encode import Encoded, Encoder
from .fingerprint import fingerprint
from .store import TokenStore
from .texts import BATCH, Texts
from .workers import LostWorkerError, leave_with_parent

logger = logging.getLogger(__name__)
_AHEAD = 4  # batches a process that wait or are under way: enough to keep it busy, few enough to hold


def tokenize(
    data: Any,
    tokenizer: Any,
    *,
    text_fields: Sequence[str] = ("text",),
    label_field: str | None = None,
    target_field: str | None = None,
    append_eos: bool = False,
    max_length: int | None = None,
    processes: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TokenStore:
    """Tokenise every example, without padding.

    Args:
        data: mappings from field names to values; a ``datasets.Dataset`` or a ``pyarrow`` table; the path of a Parquet or
            Arrow file; or the name of a data set that ``datasets`` can load, whose training split is taken.
        tokenizer: the model's, of transformers.
        text_fields: one field of text, or two that the tokenizer joins as a pair.
        label_field: a field with one number an example, kept as ``labels``.
        target_field: for decoders, the text that is to be learned after the one text field. An example is then text,
            newline, target, end of text; ``labels`` are the target's tokens and -100 before them; and an example that
            exceeds ``max_length`` loses the beginning of its text, never its target.
        append_eos: end every example with the tokenizer's end-of-text token, as language modelling on packed documents
            wants it. A target has it always.
        max_length: the most tokens of an example; more are cut off, on the tokenizer's side. Default: nothing is cut.
        processes: how many work at once. Default: one a processor, but none for fewer than ten thousand examples.
        cache_dir: where the store's file is kept, named by what it was made from: texts, tokenizer, choices and versions.
            A second call with the same maps the file. Several processes may ask at once: one works, the others wait.
            Default: the store stays in memory.
        progress: whether a bar is drawn on standard error, where that is a terminal.

    Returns:
        A store with ``input_ids`` (int32), ``token_type_ids`` where the tokenizer tells texts apart by them, and ``labels``.

    Raises:
        DataError: no examples; a field that is absent, no text or no number; a text of no tokens; a target that does not
            fit. The row is named. ConfigError: choices that contradict one another or suit no such tokenizer.
        LostWorkerError: a process died at work.

    Example:
        >>> from hiddenkey_rs.experiments.models import byte_tokenizer
        >>> store = tokenize([{"text": "ab"}, {"text": "c"}], byte_tokenizer(), append_eos=True)
        >>> store.lengths.tolist()
        [3, 2]
    """
    texts = Texts.of(data, text_fields, label_field, target_field)
    job = Tokenisation(texts, Encoder(tokenizer, len(texts.text_fields), append_eos, max_length))
    if cache_dir is None:
        return job.run(processes, progress)
    store, reused = job.keep(Path(cache_dir) / f"{job.key()}.arrow", processes, progress)
    logger.info("%d rows of tokens %s %s", len(store), "come from" if reused else "are kept in", store.path)
    return store


@dataclass(frozen=True)
class Tokenisation:
    """Texts and how they are to become tokens."""

    texts: Texts
    encoder: Encoder

    def key(self) -> str:
        """32 hexadecimal digits of everything that the tokens depend on."""
        return fingerprint(self.texts, self.encoder)

    def keep(self, path: Path, processes: int | None = None, progress: bool = True) -> tuple[TokenStore, bool]:
        """(the store in ``path``, whether it was there already), made again if it is damaged or of other texts."""
        key = self.key()
        store = _kept(path, key)  # without the lock: the place may be one that only others write to
        if store is not None:
            return store, True
        with _locked(path):
            store = _kept(path, key)  # somebody else may have made it meanwhile
            if store is not None:
                return store, True
            if path.exists():
                logger.warning("%s is damaged or of something else: made again", path)
            return self.run(processes, progress).save(path, origin=key), False

    def run(self, processes: int | None = None, progress: bool = True) -> TokenStore:
        """The store, in memory."""
        count = _processes(processes, len(self.texts))
        parts = []
        with _bar(len(self.texts), progress) as bar:
            for part in self._encoded(count):
                parts.append(part)
                bar.update(len(part.lengths))
        return _joined(parts)

    def _encoded(self, processes: int) -> Iterator[Encoded]:
        if processes == 1:
            yield from map(self.encoder, self.texts.batches())
            return
        # Forked where that is possible: a spawned process would import torch and transformers before its first batch.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        waiting: deque[Future[Encoded]] = deque()
        with ProcessPoolExecutor(processes, context, _start, (self.encoder,)) as pool:
            try:
                for batch in self.texts.batches():
                    waiting.append(pool.submit(_work, batch))
                    if len(waiting) >= _AHEAD * processes:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BrokenProcessPool:
                raise LostWorkerError(
                    f"a process died while it tokenised (got {processes} processes); it may have run out of memory: use fewer"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


_encoder: Encoder | None = None


def _start(encoder: Encoder) -> None:
    """Run once in every process. Ctrl-C is its parent's; threads it was copied without, so its tokenizer starts none."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent()  # it would hold the cache's lock
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder


def _work(batch: Any) -> Encoded:
    assert _encoder is not None
    return _encoder(batch)


def _processes(asked: int | None, rows: int) -> int:
    if asked is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(cores, rows // (5 * BATCH)))
    if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= 1024:
        raise ConfigError(f"processes must be an integer in 1..=1024 (got {asked!r}); 1 works in this process")
    return asked


def _kept(path: Path, key: str) -> TokenStore | None:
    """The store in ``path``, if it is whole and was made from this."""
    try:
        store = TokenStore(path)
        store.verify()
    except DataError:
        return None
    return store if store.origin == key else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """For one process at a time. A lock goes with its process, however that ends."""
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"tokens cannot be kept there (got {str(path)!r}: {error.strerror or error}); choose another place"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _joined(parts: list[Encoded]) -> TokenStore:
    def columns(kind: str) -> dict[str, Array]:
        return {name: np.concatenate([getattr(part, kind)[name] for part in parts]) for name in getattr(parts[0], kind)}

    offsets = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))])
    ids = np.concatenate([part.ids for part in parts])
    return TokenStore((ids, offsets), token_columns=columns("token_columns"), row_columns=columns("row_columns"))


@contextmanager
def _bar(rows: int, shown: bool) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=rows, unit=" rows", desc="tokenise", file=sys.stderr, disable=None if shown else True) as bar:
        yield bar
