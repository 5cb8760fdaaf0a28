"""One batch from row numbers to tensors: the collator against NumPy on the same flat arrays, and against collators of lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..experiments.extras import extra
from ..loading.collator import Collator
from ..loading.store import TokenStore
from .batches_data import even_lengths, store_of
from .harness import Case, Entrant, Goal, Pair

NUMPY = "NumPy, flat arrays"
PADDED = "collate, padded"
_IGNORED = -100
Batch = dict[str, Tensor]


def cases(rows: int, shapes: tuple[tuple[int, int], ...]) -> Iterator[Case]:
    """``rows`` examples of low..high tokens, padded with labels, and joined into one row."""
    for low, high in shapes:
        store = store_of(even_lengths(64 * rows, low, high))
        yield _padded(store, rows, low, high)
        yield _flat(store, rows, low, high)


def _padded(store: TokenStore, rows: int, low: int, high: int) -> Case:
    chosen = np.random.default_rng(4).permutation(len(store))[:rows]
    numbers, features = chosen.tolist(), _features(store, chosen)
    collate = Collator(labels="tokens")
    expected = _by_hand(features)

    def ours() -> Batch:
        return collate(store.__getitems__(numbers))

    def with_numpy() -> Batch:
        return _numpy(store.values, store.offsets, chosen)

    peers = [Entrant(NUMPY, with_numpy, _checked(with_numpy, expected))]
    peers += [_transformers(name, features, expected) for name in ("WithPadding", "ForLanguageModeling", "ForSeq2Seq")]
    stated = (rows, low, high) == (32, 16, 512)
    goals = {NUMPY: Goal("speedup", 3)} if stated else {}
    pairs = [Pair(PADDED, "ours", peer.name, goals.get(peer.name)) for peer in peers]
    sizes = {"rows": rows, "low": low, "high": high}
    entrants = [Entrant("ours", ours, _checked(ours, expected)), *peers]
    return Case("batches", sizes, "us/batch", 1e6, 1, entrants, pairs)


def _flat(store: TokenStore, rows: int, low: int, high: int) -> Case:
    chosen = np.random.default_rng(5).permutation(len(store))[:rows]
    numbers = chosen.tolist()
    features = [{name: part.tolist() for name, part in entry.items()} for entry in _features(store, chosen)]
    collate = Collator(layout="flat", labels="tokens")
    theirs = extra("transformers").DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def ours() -> Batch:
        return collate(store.__getitems__(numbers))

    def peer() -> Batch:
        return theirs([dict(entry) for entry in features])

    def right() -> bool:
        mine, other = ours(), peer()
        same = all(torch.equal(mine[name], other[name]) for name in ("input_ids", "labels", "position_ids"))
        return same and torch.equal(mine["cu_seq_lens_q"], other["cu_seq_lens_q"])

    name = "DataCollatorWithFlattening"
    entrants = [Entrant("ours", ours, right), Entrant(name, peer, right)]
    sizes = {"rows": rows, "low": low, "high": high}
    return Case("batches", sizes, "us/batch", 1e6, 1, entrants, [Pair("collate, flat", "ours", name)])


def _features(store: TokenStore, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Examples as other data sets give them, but for the lists: a collator's own part is what is timed."""
    return [{"input_ids": store.values[store.offsets[row] : store.offsets[row + 1]]} for row in rows]


def _numpy(values: NDArray[Any], offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> Batch:
    """What one writes without a library: preallocated planes, one slice a row."""
    starts, ends = offsets[rows], offsets[rows + 1]
    width = int((ends - starts).max())
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), _IGNORED, np.int64)
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        tokens, length = values[start:end], end - start
        ids[row, :length] = tokens
        mask[row, :length] = 1
        labels[row, :length] = tokens
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(plane) for name, plane in found.items()}


def _by_hand(features: list[dict[str, Any]]) -> Batch:
    width = max(len(entry["input_ids"]) for entry in features)
    ids, mask, labels = [], [], []
    for entry in features:
        tokens = entry["input_ids"].tolist()
        rest = width - len(tokens)
        ids.append(tokens + rest * [0])
        mask.append(len(tokens) * [1] + rest * [0])
        labels.append(tokens + rest * [_IGNORED])
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(plane) for name, plane in found.items()}


def _checked(call: Callable[[], Batch], expected: Batch) -> Callable[[], bool]:
    return lambda: all(torch.equal(call()[name], plane) for name, plane in expected.items())


def _transformers(name: str, features: list[dict[str, Any]], expected: Batch) -> Entrant:
    """One of transformers' collators, on the Python lists that it takes. ``WithPadding`` makes no labels."""
    tokenizer = padding_tokenizer()
    listed = [{"input_ids": entry["input_ids"].tolist()} for entry in features]
    if name == "ForSeq2Seq":
        listed = [{**entry, "labels": entry["input_ids"]} for entry in listed]
    options = {"ForLanguageModeling": {"mlm": False}}.get(name, {})
    collator = getattr(extra("transformers"), f"DataCollator{name}")(tokenizer, **options)

    def call() -> Batch:
        return collator([dict(entry) for entry in listed])

    makes = [plane for plane in expected if plane != "labels" or name != "WithPadding"]
    return Entrant(f"DataCollator{name}", call, _checked(call, {plane: expected[plane] for plane in makes}))


def padding_tokenizer() -> Any:
    """A tokenizer that only pads: collators ask it for nothing else."""
    tokenizers = extra("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    return extra("transformers").PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
