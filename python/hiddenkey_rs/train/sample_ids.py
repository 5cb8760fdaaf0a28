"""How an example's id travels from the data set through any collator to the masks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..errors import DataError

SAMPLE_ID = "sample_id"
"""The column that holds an example's id, or one id a token. Without it an example's id is its row in the training set."""

SAMPLE_POSITION = "sample_position"
"""Beside one id a token: every token's place in its example. Without it examples are runs of equal ids."""


class PaddingId(int):
    """The id of a padding row, -1: the data set itself has no example of it."""


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
    """Any collator, with the examples' ids taken out before and put beside its batch after.

    ``sample_id`` is (B,) int64. It is (B, L), -1 at padding, where rows hold several examples: because a feature brings
    one id a token, or because the collator lays examples one behind the other (``position_ids`` and no
    ``attention_mask``). ``sample_position``, (B, L) int64, stands beside it where features bring it, or where it alone tells
    two examples of one id apart. ``required``: whether examples must have an id; if not, only those with one a token are taken
    care of, and everything else is left to the collator.

    Example:
        >>> def flat(features):
        ...     ids = torch.tensor([token for feature in features for token in feature["input_ids"]])[None]
        ...     return {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0]])}
        >>> features = [{"input_ids": [5, 6], "sample_id": 4}, {"input_ids": [7], "sample_id": 9}]
        >>> SampleIdCollator(flat)(features)["sample_id"]
        tensor([[4, 4, 9]])
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]], required: bool = True) -> None:
        self.collator, self.required = collator, required

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The inner collator's batch with ``sample_id`` beside it."""
        missing = [number for number, feature in enumerate(features) if SAMPLE_ID not in feature]
        if not self.required and not any(isinstance(feature.get(SAMPLE_ID), _SEVERAL) for feature in features):
            return dict(self.collator([_without_words(feature) for feature in features]))
        if missing:
            raise DataError(
                f"an example has no sample id (got fields {', '.join(map(str, features[missing[0]]))}); give an iterable "
                f"data set a {SAMPLE_ID!r} column with the examples' numbers"
            )
        ids = [feature[SAMPLE_ID] for feature in features]
        rest = [{name: value for name, value in feature.items() if name not in _OWN} for feature in features]
        batch = dict(self.collator(rest))
        by_token = [np.ndim(given) == 1 for given in ids]
        ids = [given if listed else _number(given) for given, listed in zip(ids, by_token, strict=True)]
        if not any(by_token) and not _flattened(batch):
            return {**batch, SAMPLE_ID: torch.tensor(ids, dtype=torch.int64)}
        spread = [
            given if listed else [given] * len(feature["input_ids"])
            for given, listed, feature in zip(ids, by_token, features, strict=True)
        ]
        batch[SAMPLE_ID] = _lay(spread, batch, SAMPLE_ID)
        if all(SAMPLE_POSITION in feature for feature in features):
            batch[SAMPLE_POSITION] = _lay([feature[SAMPLE_POSITION] for feature in features], batch, SAMPLE_POSITION)
        elif any(len(one) and len(other) and one[-1] == other[0] for one, other in pairwise(spread)):
            # Two examples of one id side by side: only their positions tell where the second begins.
            batch[SAMPLE_POSITION] = _lay([_counted(part) for part in spread], batch, SAMPLE_POSITION)
        return batch


def _number(given: Any) -> int:
    value = given.item() if isinstance(given, (Tensor, np.ndarray, np.generic)) else given
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not (0 <= value < 1 << 63 or isinstance(value, PaddingId))
    ):
        raise DataError(
            f"a sample id is a whole number from 0 up (got {value!r}); number the examples in the column {SAMPLE_ID!r}, or call "
            "it otherwise and each one's row is taken"
        )
    return value


def _without_words(feature: dict[str, Any]) -> dict[str, Any]:
    """An example to evaluate: its id is for the collator to know, as it always was, but for text, which none pads."""
    if not isinstance(feature.get(SAMPLE_ID), str):
        return feature
    return {name: value for name, value in feature.items() if name != SAMPLE_ID}


_OWN = (SAMPLE_ID, SAMPLE_POSITION)
_SEVERAL = (list, tuple, np.ndarray, Tensor)


def _flattened(batch: Mapping[str, Any]) -> bool:
    """Whether the collator laid its examples one behind the other, as padding-free training wants them."""
    return batch.get("attention_mask") is None and batch.get("position_ids") is not None


def _counted(ids: Sequence[int]) -> list[int]:
    """Every token's place in its run of equal ids."""
    return [place for _, run in groupby(ids) for place, _ in enumerate(run)]


def _lay(parts: Sequence[Any], batch: Mapping[str, Any], name: str) -> Tensor:
    """One number a token of every feature over the batch's tokens: (B, L) int64, -1 at padding."""
    tokens, mask = batch["input_ids"], batch.get("attention_mask")
    flat = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)
    counts = torch.tensor([len(part) for part in parts])
    rows = counts if len(counts) == len(tokens) else counts.sum()[None]
    if mask is None or mask.dim() != 2:  # what was added to fill a row stands behind its tokens
        mask = torch.arange(tokens.shape[1]) < rows[:, None]
    real = mask != 0
    if real.shape != tokens.shape or not torch.equal(real.sum(dim=1), rows):
        raise DataError(
            f"the collator's batch holds other tokens than the features brought a {name} for (got rows of "
            f"{real.sum(dim=1).tolist()} tokens, and {rows.tolist()}); do not truncate in the collator, or cut {name!r} too"
        )
    laid = torch.full(tokens.shape, -1, dtype=torch.int64)
    laid[real] = flat
    return laid


def is_hub_data(dataset: Any) -> bool:
    """Whether it is a ``datasets.Dataset``; that package need not be there."""
    kind = getattr(sys.modules.get("datasets"), "Dataset", None)
    return isinstance(kind, type) and isinstance(dataset, kind)


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
