"""Data sets as users have them, in a Trainer: sized streams, odd columns, stores beside lists, ids of other kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from torch.utils.data import ChainDataset, Dataset, IterableDataset

import distributed_work as work
import families
import hiddenkey_rs as hk
from hiddenkey_rs.train import SampleIdCollator
from hiddenkey_rs.train.fingerprint import data_parts
from hiddenkey_rs.train.loader import PaddedRows
from hiddenkey_rs.train.resume import check_place

PLAIN = work.rows("bert", 12)
FAST = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 1}


def trainer(out: Path, data: Any, **more: Any) -> hk.HiddenKeyTrainer:
    own = {name: more.pop(name) for name in ("loader", "eval_dataset", "data_collator", "config") if name in more}
    args = tf.TrainingArguments(str(out), **{**FAST, "per_device_train_batch_size": 4, **more})
    own.setdefault("data_collator", hk.Collator())
    return hk.HiddenKeyTrainer(model=families.build("bert"), args=args, train_dataset=data, stock_dropout="off", **own)


class Lines(IterableDataset):
    """A stream that knows its length, as files whose lines were counted."""

    def __len__(self) -> int:
        return len(PLAIN)

    def __iter__(self) -> Any:
        return ({**row, "sample_id": n} for n, row in enumerate(PLAIN))


def test_a_stream_with_a_length_trains_and_saves(tmp_path: Path) -> None:
    run = trainer(tmp_path, Lines(), max_steps=-1, num_train_epochs=1, save_strategy="steps", save_steps=2)
    assert run.train().global_step == 3
    assert json.loads((tmp_path / "checkpoint-2" / "hiddenkey_data.json").read_text())["data set's size"] == "12"
    assert data_parts(ChainDataset([Lines(), work.Stream(PLAIN)])) == {"data set's size": "unknown"}


def test_a_collator_that_writes_over_its_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hk.ConfigError, match=r"holds batches for as long as it likes \(got a Collator with buffers=2"):
        trainer(tmp_path, work.store(PLAIN), data_collator=hk.Collator(buffers=2))
    trainer(tmp_path, work.store(PLAIN), data_collator=hk.Collator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataloader_in_order": False}, r"dataloader_in_order would mix .* \(got False\); leave it True"),
        ({"accelerator_config": {"dispatch_batches": True}}, r"dispatch_batches would .* \(got True\); leave it False"),
        ({"accelerator_config": {"split_batches": True}}, r"split_batches would cut .* \(got True\); leave it False"),
    ],
)
def test_what_goes_against_our_batches_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(hk.ConfigError, match=message):
        trainer(tmp_path, work.store(PLAIN), **arguments)
    if "split_batches" not in str(arguments):
        trainer(tmp_path, PLAIN, loader="stock", **arguments)


class Chunks(Dataset):
    """Rows, and an attribute of the name that ours has, of something else; another variant of them each epoch."""

    lengths = [3, 4]

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(PLAIN)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return PLAIN[row]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_other_lengths_than_rows_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, Chunks(), loader="hiddenkey")
    with pytest.raises(hk.DataError, match=r"other lengths than rows \(got 2 for 12\)"):
        run.train()


def test_a_data_set_is_told_the_epoch(tmp_path: Path) -> None:
    for loader in ("stock", "hiddenkey"):
        data = Chunks()
        data.lengths = [len(row["input_ids"]) for row in PLAIN]
        trainer(tmp_path, data, loader=loader, max_steps=5).train()
        assert {0, 1} <= set(data.epochs), loader
    assert not hasattr(PaddedRows(PLAIN), "set_epoch")


def test_stores_stand_beside_lists_and_come_late(tmp_path: Path) -> None:
    """Columns that the model does not take leave lists all the same."""
    named = [{**row, "sentence": "some text"} for row in PLAIN]
    store = work.store(PLAIN)
    for train, evaluated in ((named, store), (store, named), (datasets.Dataset.from_list(named), store)):
        run = trainer(tmp_path, train, eval_dataset=evaluated, data_collator=padding)
        run.train()
        seen = run.evaluate()["eval_loss"]
        assert run.predict(store).metrics["test_loss"] == pytest.approx(seen, rel=1e-5)
        run.handle.detach()
    run = trainer(tmp_path, PLAIN, data_collator=padding)
    assert run.predict(store).metrics["test_loss"] == pytest.approx(run.evaluate(PLAIN)["eval_loss"], rel=1e-5)


def padding(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As ``DataCollatorWithPadding``: text is no tensor."""
    assert all(set(feature) <= {"input_ids", "labels", "sample_id"} for feature in features)
    return {name: value for name, value in hk.Collator()(features).items() if name != "sample_id"}


def test_unused_columns_are_not_even_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{**row, "image": "a picture"} for row in PLAIN])
    seen: list[list[str]] = []
    read = datasets.Dataset.__getitems__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets.Dataset, "__getitems__", lambda self, rows: seen.append(self.column_names) or read(self, rows)
        )
        for loader in ("stock", "hiddenkey"):
            trainer(tmp_path, data, loader=loader, data_collator=padding).train()
    assert seen
    assert all("image" not in names for names in seen)


@pytest.mark.parametrize("loader", ["stock", "hiddenkey"])
def test_a_transform_reads_the_columns_that_it_wants(loader: str, tmp_path: Path) -> None:
    def made(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [[5 + len(text), 7] for text in batch["text"]], "labels": batch["kind"]}

    data = datasets.Dataset.from_dict({"text": ["a", "bc", "d", "efg"] * 3, "kind": [0, 1, 0, 1] * 3})
    run = trainer(tmp_path, data.with_transform(made), loader=loader, data_collator=padding)
    assert run.train().global_step == 2


@pytest.mark.parametrize("loader", ["stock", "hiddenkey"])
def test_a_column_of_lengths_is_read(loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rows are not walked through for them."""
    data = datasets.Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in PLAIN])
    monkeypatch.setattr(datasets.Dataset, "__iter__", lambda self: pytest.fail("walked through the rows"))
    arguments = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    assert trainer(tmp_path, data, loader=loader, **arguments).train().global_step == 2


def test_labels_of_fractions_are_of_examples() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [0.0, 1.0, 0.5]}, {"input_ids": [8, 9, 4], "labels": [1.0, 0.0, 0.0]}]
    batch = hk.Collator()(rows)
    assert batch["labels"].tolist() == [row["labels"] for row in rows]
    assert batch["labels"].is_floating_point()
    whole = hk.Collator()([{**row, "labels": [int(x) for x in row["labels"]]} for row in rows])
    assert whole["labels"].dtype == torch.int64


@pytest.mark.parametrize("value", ["train-1", 3.5, True, -1, 1 << 70, np.float32(2), torch.tensor(1.5)])
def test_ids_that_are_no_numbers_are_refused(value: Any) -> None:
    collator = SampleIdCollator(hk.Collator())
    row = {"input_ids": [5, 6], "labels": 0}
    with pytest.raises(hk.DataError, match=r"a sample id is a whole number from 0 up \(got .*\); number the examples"):
        collator([{**row, "sample_id": value}])
    for good in (4, np.int32(4), torch.tensor(4)):
        assert collator([{**row, "sample_id": good}])["sample_id"].tolist() == [4]


def test_names_of_examples_are_left_out_of_evaluation(tmp_path: Path) -> None:
    named = [{**row, "sample_id": f"dev-{n}"} for n, row in enumerate(PLAIN)]
    run = trainer(tmp_path, PLAIN, data_collator=padding)
    assert run.evaluate(named)["eval_loss"] == pytest.approx(run.evaluate(PLAIN)["eval_loss"], rel=1e-6)


def test_a_place_is_not_found_among_rows_drawn_from_the_global_generator(tmp_path: Path) -> None:
    arguments = {"accelerator_config": {"use_seedable_sampler": False}, "save_strategy": "steps", "max_steps": 8}
    trainer(tmp_path, PLAIN, loader="stock", save_steps=1, **arguments).train()
    message = r"rows that are drawn without use_seedable_sampler \(got .*checkpoint-4' in the middle of epoch 2\)"
    with pytest.raises(hk.StateError, match=message):
        trainer(tmp_path, PLAIN, loader="stock", **arguments).train(str(tmp_path / "checkpoint-4"))
    for step in (2, 6):
        trainer(tmp_path, PLAIN, loader="stock", **arguments).train(str(tmp_path / f"checkpoint-{step}"))
    check_place("at an epoch's end", 2.0, "drawn")
