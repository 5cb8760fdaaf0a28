"""A LoRA run from loader to optimiser: how many examples a second, and how much of a step is spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader

from ..experiments.extras import extra
from ..loading.collator import Collator
from ..loading.loader import build_dataloader
from ..loading.store import TokenStore
from . import machine
from .batches_collate import padding_tokenizer
from .batches_data import VOCABULARY, glue_lengths, store_of
from .harness import Goal, Row, summary
from .step_models import MINUS, Runner, Shape, base_model

_MINILM = Shape("encoder", layers=6, hidden=384, heads=12, vocab=VOCABULARY, length=128, batch=32)
_WORKERS = (0, 2, 4)
WAITING, EXAMPLES = "waiting for data", "an example of a run"


def rows(steps: int, threads: int, place: Mapping[str, Any]) -> Iterator[Row]:
    """``steps`` steps of HiddenKey- with each loader, batches of 32 examples of MRPC's and SST-2's lengths.

    Ours sorts by length in windows, as ``group_by_length`` would; the stock loader draws at random, as it does by itself.
    """
    with machine.using_threads(threads):
        yield from _rows(steps, threads, place)


def _rows(steps: int, threads: int, place: Mapping[str, Any]) -> Iterator[Row]:
    store = store_of(glue_lengths(64 * 32))
    runner = Runner(_MINILM, MINUS, base_model(_MINILM, "cpu"), "cpu")
    loaders: dict[str, Any] = {
        "ours": build_dataloader(store, batch_size=32, collator=Collator(), world_size=1, rank=0)
    }
    listed = [_listed(store, row) for row in range(len(store))]
    for workers in _WORKERS:
        loaders[f"DataLoader, {workers} workers"] = _stock(listed, workers)
    figures = {name: _run(runner, loader, steps) for name, loader in loaders.items()}
    right = _same(store, loaders["ours"], listed)
    ours = figures.pop("ours")
    sizes = {"steps": steps, "batch": 32}
    for name, peer in figures.items():
        stated = name.endswith(" 0 workers")
        cases = (
            (WAITING, "% of a step", 100.0, "share", Goal("median", 1) if stated else None),
            (EXAMPLES, "ms", 1e3, "each", None),
        )
        for case, unit, scale, part, goal in cases:
            mine, theirs = (summary(found[part], scale) for found in (ours, peer))
            yield Row(
                "batches", case, sizes, threads, unit, mine, {"name": name, **theirs}, goal, checked=right, about=place
            )


def _run(runner: Runner, loader: Any, steps: int) -> dict[str, list[float]]:
    """Of every step but the first: the share of it that was waiting; of all of them together: seconds an example.

    Together, because batches that are sorted by length differ: most are short, and the time is in the long ones.
    """
    shares: list[float] = []
    seconds, examples = 0.0, 0
    batches = iter(loader)
    for step in range(steps + 1):
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        ids = batch.pop("sample_id", range(len(batch["labels"])))
        assert runner.handle is not None
        with runner.handle.step(step, ids):
            loss = runner.handle.compute(batch, model=runner.model).loss
        loss.backward()
        runner.update()
        whole = time.perf_counter() - start
        if step:  # the first one starts workers and warms the model
            shares.append(waited / whole)
            seconds += whole
            examples += len(batch["labels"])
    return {"share": shares, "each": [seconds / examples]}


def _stock(listed: Sequence[Mapping[str, Any]], workers: int) -> DataLoader[Any]:
    """What the Trainer makes of a tokenised data set, without its wrapping."""
    data = extra("datasets").Dataset.from_list(list(listed))
    collator = extra("transformers").DataCollatorWithPadding(padding_tokenizer())
    return DataLoader(data, batch_size=32, shuffle=True, collate_fn=collator, num_workers=workers)


def _listed(store: TokenStore, row: int) -> dict[str, Any]:
    example = store[row]
    ids = example["input_ids"].tolist()
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(example["labels"])}


def _same(store: TokenStore, loader: Any, listed: Sequence[Mapping[str, Any]]) -> bool:
    """What our loader delivers is what stands in the lists."""
    batch = next(iter(loader))
    for number, row in enumerate(batch["sample_id"].tolist()):
        length = int(batch["attention_mask"][number].sum())
        if batch["input_ids"][number, :length].tolist() != listed[row]["input_ids"]:
            return False
        if int(batch["labels"][number]) != listed[row]["labels"]:
            return False
    return len(store) == len(listed)
