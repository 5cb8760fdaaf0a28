"""Examples as other data sets give them, dictionaries of lists, made into the flat columns of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

LABELS = ("labels", "label", "label_ids")
SAMPLE_ID = "sample_id"


@dataclass(frozen=True, eq=False)
class Examples:
    """A few examples, shaped like a :class:`TokenStore`. ``sample_ids`` is None where the examples bring none."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]
    token_columns: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    row_columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    sample_ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1


def from_features(features: Sequence[Mapping[str, Any]]) -> Examples:
    """The examples of ``features``: ``input_ids``, and where there are any labels, token types and sample ids.

    ``labels`` (or ``label``, ``label_ids``) of one integer a token are per token, others per example: numbers, or vectors of
    equal length. Other keys are left out.

    Raises:
        DataError: no examples, no ``input_ids``, a key that only some examples have, columns of another length, values that
            are no numbers, an attention mask that hides a token: examples must not be padded yet.
    """
    if isinstance(features, (str, bytes, Mapping)) or not isinstance(features, Sequence) or not len(features):
        got = "no examples" if isinstance(features, Sequence) and not len(features) else type(features).__name__
        raise DataError(f"a collator takes the rows of a store or a list of examples (got {got}); see Collator")
    ids = _column(features, "input_ids")
    if ids is None:
        raise DataError(f"an example has no input_ids (got keys {_keys(features[0])}); tokenise the data set")
    lengths = [array.size for array in ids]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens: dict[str, NDArray[np.int64]] = {}
    rows: dict[str, NDArray[Any]] = {}
    for name in ("token_type_ids", "attention_mask"):
        column = _column(features, name)
        if column is not None:
            tokens[name] = _flat(column, name, lengths)
    hidden = np.flatnonzero(tokens.pop("attention_mask", np.empty(0)) != 1)
    if len(hidden):
        row = int(np.searchsorted(offsets, hidden[0], side="right")) - 1
        raise DataError(
            f"the attention mask hides a token (got 0 in example {row}); tokenise without padding: batches are padded here"
        )
    for name in LABELS:
        labels = _column(features, name)
        if labels is not None:
            # Fractions are no classes of tokens, how many there are says nothing then.
            whole = all(array.dtype.kind in "iub" or not array.size for array in labels)
            if whole and all(array.ndim == 1 and array.size == n for array, n in zip(labels, lengths, strict=True)):
                tokens["labels"] = _flat(labels, name, lengths)
            else:
                rows["labels"] = _stacked(labels, name)
            break
    samples = _column(features, SAMPLE_ID)
    sample_ids = None if samples is None else _flat(samples, SAMPLE_ID, [1] * len(features))
    return Examples(_flat(ids, "input_ids", lengths), offsets, tokens, rows, sample_ids)


def _keys(feature: Any) -> str:
    return ", ".join(map(str, feature)) if isinstance(feature, Mapping) else type(feature).__name__


def _column(features: Sequence[Mapping[str, Any]], name: str) -> list[NDArray[Any]] | None:
    """One array an example, or None if no example has the key."""
    having = [isinstance(feature, Mapping) and name in feature for feature in features]
    if not any(having):
        return None
    if not all(having):
        number = having.index(False)
        raise DataError(
            f"an example has no {name}, others do (got keys {_keys(features[number])} in example {number}); give it to all"
        )
    arrays = []
    for number, feature in enumerate(features):
        try:
            array = np.asarray(feature[name])
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{name} must be numbers (got {error} in example {number}); convert them") from None
        if array.size and array.dtype.kind not in "iufb":
            raise DataError(f"{name} must be numbers (got {array.dtype} in example {number}); convert them")
        arrays.append(array)
    return arrays


def _flat(arrays: list[NDArray[Any]], name: str, lengths: list[int]) -> NDArray[np.int64]:
    for number, (array, size) in enumerate(zip(arrays, lengths, strict=True)):
        if array.size != size or array.ndim > 1:
            raise DataError(
                f"{name} must be as long as the tokens (got shape {array.shape} for {size} in example {number}); "
                "tokenise again"
            )
        if array.size and array.dtype.kind not in "iub":
            raise DataError(f"{name} must be integers (got {array.dtype} in example {number}); convert them")
    return np.concatenate([array.reshape(-1).astype(np.int64) for array in arrays])


def _stacked(arrays: list[NDArray[Any]], name: str) -> NDArray[Any]:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise DataError(
            f"{name} of a batch must have one shape, or one number a token (got shapes {sorted(shapes)}); mend the data"
        )
    return np.stack(arrays)
