"""How a document's number and its tokens' places stay with it through TRL's preparation and packing.

TRL's packing keeps list columns with one entry a token, and nothing else: so ids and places are such columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from trl import pack_dataset
from trl.data_utils import get_dataset_column_names

from ..errors import ConfigError, DataError
from .sample_ids import SAMPLE_ID, SAMPLE_POSITION
from .sft_checks import check_columns

_TOKEN_COLUMNS = ["input_ids", "labels", SAMPLE_ID, SAMPLE_POSITION]


def with_ids(dataset: Any, prepares: bool) -> Any:
    """The training set with a ``sample_id`` column: its own, or the row numbers of what was given.

    Args:
        dataset: a ``datasets.Dataset`` or ``IterableDataset``.
        prepares: whether TRL will tokenise it. A data set that is left alone gets its ids when rows are read.

    Raises:
        ConfigError: another kind of data set; images; rows that are packed already without numbers.
        DataError: an iterable data set without ids; ids of another kind than integers.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ConfigError(
            f"TRL prepares data sets of the package datasets (got {type(dataset).__name__}); give one, or train a token "
            "store with HiddenKeyTrainer"
        )
    columns = get_dataset_column_names(dataset)
    feature = (dataset.features or {}).get(SAMPLE_ID)
    check_columns(columns, by_token=hasattr(feature, "feature"))
    if SAMPLE_ID in columns:
        _check_ids(feature)
        return dataset
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"rows of an iterable data set have no numbers (got columns {', '.join(columns)}); give it a {SAMPLE_ID!r} "
            "column with the examples' numbers in the whole set"
        )
    return dataset.add_column(SAMPLE_ID, np.arange(len(dataset))) if prepares else dataset


def _check_ids(feature: Any) -> None:
    """A :class:`DataError` unless the column holds integers, or lists of them. Unknown features are checked in training."""
    kind = getattr(getattr(feature, "feature", feature), "dtype", None)
    if feature is not None and "int" not in str(kind):
        raise DataError(f"{SAMPLE_ID!r} must be a column of integers (got {kind}); number the examples from 0")


def pack_documents(dataset: Any, args: Any) -> Any:
    """TRL's packing of a tokenised data set with a ``sample_id`` column, with ids and places of all tokens.

    Args:
        dataset: has ``input_ids``, ``labels`` and ``sample_id``, one document a row.
        args: ``max_length``, ``packing_strategy``, ``shuffle_dataset``, ``seed`` and ``dataset_num_proc`` are TRL's.

    Raises:
        ConfigError: no ``max_length`` to pack to.
    """
    if args.max_length is None:
        raise ConfigError("packing needs the length of a row (got max_length=None); set max_length")
    iterable = isinstance(dataset, IterableDataset)
    how = {} if iterable else {"num_proc": args.dataset_num_proc}
    described = {} if iterable else {"desc": "Numbering the tokens of the train dataset"}
    dataset = dataset.map(_number_tokens, batched=True, **how, **described).select_columns(_TOKEN_COLUMNS)
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    described = {} if iterable else {"desc": "Packing train dataset"}
    dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, {**how, **described})
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _number_tokens(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
    lengths = [len(tokens) for tokens in batch["input_ids"]]
    if any(isinstance(number, list) for number in batch[SAMPLE_ID]):
        raise DataError(
            f"rows that bring one {SAMPLE_ID} a token are packed already (got packing=True); set packing=False"
        )
    return {
        SAMPLE_ID: [[number] * length for number, length in zip(batch[SAMPLE_ID], lengths, strict=True)],
        SAMPLE_POSITION: [list(range(length)) for length in lengths],
    }
