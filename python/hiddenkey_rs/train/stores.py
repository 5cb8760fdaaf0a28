"""Token stores as the Trainer's data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch.utils.data import Subset

from ..errors import ConfigError, DataError
from ..loading.collator import Collator
from ..loading.packed import PackedStore
from ..loading.rows import RowBatch
from ..loading.store import TokenStore
from .sample_ids import SampleIdCollator


def is_store(data: Any) -> bool:
    """Whether a data set gives rows of flat arrays instead of examples."""
    return isinstance(data, (TokenStore, PackedStore))


def check_stores(collator: Any, train: Any, evaluated: Any) -> None:
    """Of a Trainer's arguments: that a store is taken as it is, and that nobody counts on a collator that is not called.

    Raises:
        ConfigError: another collator than ours where there are stores and nothing else; a collator that writes over its
            batches. DataError: a part of a store.
    """
    if isinstance(collator, Collator) and collator.buffers:
        raise ConfigError(
            f"the Trainer holds batches for as long as it likes (got a Collator with buffers={collator.buffers}, which may write "
            "over them); leave buffers out"
        )
    if isinstance(train, Subset) and is_store(_whole(train)):
        raise DataError(
            f"a part of a store is no training set (got Subset of {type(_whole(train)).__name__}); make a store of the "
            "part: TokenStore(dataset.select(rows))"
        )
    ours = collator is None or isinstance(collator, (Collator, StoreCollator))
    if not ours and is_store(train) and all(is_store(_whole(data)) for data in _sets(evaluated)):
        raise ConfigError(
            f"batches of a store are made by hiddenkey_rs.Collator (got data_collator={type(collator).__name__}, which would "
            "not be called); leave it out, or give a Collator, for instance Collator(labels='tokens') for language modelling"
        )


class StoreCollator:
    """Rows of a store by our collators, lists of examples by the Trainer's.

    Args:
        rows: who takes rows of a packed store (True), and of one that is not (False). examples: the Trainer's.
    """

    def __init__(self, rows: Mapping[bool, Collator], examples: Callable[..., Mapping[str, Any]]) -> None:
        self.rows, self.examples = rows, examples

    def __call__(self, batch: Any) -> dict[str, Any]:
        """The tensors of a batch."""
        if isinstance(batch, RowBatch):
            return self.rows[isinstance(batch.store, PackedStore)](batch)
        return dict(self.examples(batch))

    @classmethod
    def around(cls, trainer: Any, *later: Any) -> Any:
        """The trainer's collator, made to take rows of a store if a data set of it is one, or one that it got ``later``.

        Raises:
            DataError: a store holds ids that the model does not know.
            ConfigError: a collator of ours whose layout goes with none of the stores.
        """
        collator, sets = trainer.data_collator, (trainer.train_dataset, *_sets(trainer.eval_dataset), *later)
        stores = [whole for data in sets if is_store(whole := _whole(data))]
        for store in stores:
            known = trainer.model.get_input_embeddings().weight.shape[0]
            (store.store if isinstance(store, PackedStore) else store).check_vocabulary(known)
        if not stores or isinstance(collator, StoreCollator):
            return collator
        rows = {packed: _rows_collator(trainer, packed) for packed in (True, False)}
        if isinstance(collator, Collator):
            packs = collator.layout == "packed"
            if packs not in (isinstance(store, PackedStore) for store in stores):
                raise ConfigError(
                    f"the collator's layout goes with none of the stores (got layout={collator.layout!r}); "
                    + ("use layout='padded'" if packs else "use layout='packed', or leave the collator out")
                )
            rows[packs] = collator
        return cls(rows, collator)

    @staticmethod
    def with_ids(collator: Any, required: bool = True) -> Any:
        """``collator`` with sample ids carried around what it makes of examples, which must have some if ``required``."""
        if isinstance(collator, StoreCollator):
            return StoreCollator(collator.rows, SampleIdCollator(collator.examples, required))
        return SampleIdCollator(collator, required)


def _sets(evaluated: Any) -> list[Any]:
    """The data sets that a Trainer evaluates: none, one, or several by name."""
    return list(evaluated.values()) if isinstance(evaluated, dict) else [] if evaluated is None else [evaluated]


def _whole(data: Any) -> Any:
    """What a data set is a part of."""
    while isinstance(data, Subset):
        data = data.dataset
    return data


def _rows_collator(trainer: Any, packed: bool) -> Collator:
    tokenizer = trainer.processing_class
    known = isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    pad = tokenizer.pad_token_id if known else trainer.model.config.pad_token_id
    return Collator(
        pad_token_id=0 if pad is None else pad,
        padding_side=tokenizer.padding_side if known and not packed else "right",
        layout="packed" if packed else "padded",
    )
