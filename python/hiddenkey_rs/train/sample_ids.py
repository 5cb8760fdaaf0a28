"""How an example's id travels from the data set through any collator to the masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from ..errors import DataError

SAMPLE_ID = "sample_id"
"""The column that holds an example's id. Without it an example's id is its row in the training set."""


class WithSampleIds(Dataset[dict[str, Any]]):
    """A map-style data set whose examples carry their row number as ``sample_id``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**_mapping(self.dataset[row]), SAMPLE_ID: int(row)}

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch, for data sets that read one faster than row by row."""
        if not hasattr(self.dataset, "__getitems__"):
            return [self[row] for row in rows]
        return [
            {**_mapping(item), SAMPLE_ID: int(row)}
            for row, item in zip(rows, self.dataset.__getitems__(rows), strict=True)
        ]

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "column_names") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SampleIdCollator:
    """Any collator, with the examples' ids taken out before and put beside its batch after: ``sample_id`` (B,) int64."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The inner collator's batch with ``sample_id`` beside it."""
        missing = [number for number, feature in enumerate(features) if SAMPLE_ID not in feature]
        if missing:
            raise DataError(
                f"an example has no sample id (got fields {', '.join(map(str, features[missing[0]]))}); give an iterable "
                f"data set a {SAMPLE_ID!r} column with the examples' numbers"
            )
        ids = torch.tensor([int(feature[SAMPLE_ID]) for feature in features], dtype=torch.int64)
        rest = [{name: value for name, value in feature.items() if name != SAMPLE_ID} for feature in features]
        return {**self.collator(rest), SAMPLE_ID: ids}


def with_sample_ids(dataset: Any) -> Any:
    """``dataset`` if its examples carry ids already (or it is iterable and must bring them), else a wrapper that adds them."""
    if dataset is None or isinstance(dataset, IterableDataset):
        return dataset
    columns = getattr(dataset, "column_names", None)
    if columns is None and len(dataset):
        columns = list(_mapping(dataset[0]))
    return dataset if columns and SAMPLE_ID in columns else WithSampleIds(dataset)


def _mapping(item: Any) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        return item
    raise DataError(
        f"the training set's examples must be mappings from argument names to values (got {type(item).__name__}); "
        "return a dict from __getitem__"
    )
