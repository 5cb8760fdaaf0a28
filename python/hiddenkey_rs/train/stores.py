"""Token stores as the Trainer's data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers

from ..loading.collator import Collator
from ..loading.packed import PackedStore
from ..loading.rows import RowBatch
from ..loading.store import TokenStore
from .sample_ids import SampleIdCollator


def is_store(data: Any) -> bool:
    """Whether a data set gives rows of flat arrays instead of examples."""
    return isinstance(data, (TokenStore, PackedStore))


class StoreCollator:
    """Rows of a store by our collator, lists of examples by the Trainer's."""

    def __init__(self, rows: Callable[[RowBatch], dict[str, Any]], examples: Callable[..., Mapping[str, Any]]) -> None:
        self.rows, self.examples = rows, examples

    def __call__(self, batch: Any) -> dict[str, Any]:
        """The tensors of a batch."""
        return self.rows(batch) if isinstance(batch, RowBatch) else dict(self.examples(batch))

    @classmethod
    def around(cls, trainer: Any) -> Any:
        """The trainer's collator, made to take rows of a store if a data set of it is one.

        Raises:
            DataError: a store holds ids that the model does not know.
        """
        collator, evaluated = trainer.data_collator, trainer.eval_dataset
        others = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        stores = [data for data in (trainer.train_dataset, *others) if is_store(data)]
        for store in stores:
            known = trainer.model.get_input_embeddings().weight.shape[0]
            (store.store if isinstance(store, PackedStore) else store).check_vocabulary(known)
        if not stores or isinstance(collator, StoreCollator):
            return collator
        return cls(collator if isinstance(collator, Collator) else _rows_collator(trainer, stores[0]), collator)

    @staticmethod
    def with_ids(collator: Any) -> Any:
        """``collator`` with sample ids carried around what it makes of examples."""
        if isinstance(collator, StoreCollator):
            return StoreCollator(collator.rows, SampleIdCollator(collator.examples))
        return SampleIdCollator(collator)


def _rows_collator(trainer: Any, store: Any) -> Collator:
    tokenizer = trainer.processing_class
    known = isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    pad = tokenizer.pad_token_id if known else trainer.model.config.pad_token_id
    packed = isinstance(store, PackedStore)
    return Collator(
        pad_token_id=0 if pad is None else pad,
        padding_side=tokenizer.padding_side if known and not packed else "right",
        layout="packed" if packed else "padded",
    )
