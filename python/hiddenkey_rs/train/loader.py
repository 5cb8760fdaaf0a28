"""Our batches in the Trainer: its own loader, with a batch sampler that makes the same steps on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..errors import ConfigError, DataError
from ..loading.sampler import BatchSampler
from ..losses import IGNORED
from ..serialise import choice
from . import ranks
from .sample_ids import SAMPLE_ID, PaddingId, WithSampleIds
from .stores import is_store
from .stream import Stream


@dataclass(frozen=True)
class Loader:
    """How training batches are made, for ``HiddenKeyTrainer(loader=...)``. Sizes are those of a whole optimiser step.

    Attributes:
        batch_size: samples of a step over all ranks and micro-batches. Default: ``per_device_train_batch_size`` x ranks x
            ``gradient_accumulation_steps``.
        token_budget: instead, the most padded tokens of a step.
        window: how many samples are sorted by length together. shuffle: whether the order is drawn. tail: ``"pad"``
            or ``"drop"`` (default: as ``dataloader_drop_last`` says). See :class:`~hiddenkey_rs.BatchSampler`.
    """

    batch_size: int | None = None
    token_budget: int | None = None
    window: int | None = None
    shuffle: bool = True
    tail: str | None = None

    def __post_init__(self) -> None:
        if self.token_budget is not None and self.batch_size is not None:
            raise ConfigError(
                f"a step has a size in rows or in tokens (got batch_size={self.batch_size} and "
                f"token_budget={self.token_budget}); give one of the two"
            )

    @staticmethod
    def of(given: Loader | str, has_store: bool) -> Loader | None:
        """What ``loader=`` means; ``None`` is the Trainer's own."""
        if isinstance(given, Loader):
            return given
        kind = choice(given, ("auto", "hiddenkey", "stock"), "loader")
        return Loader() if kind == "hiddenkey" or (kind == "auto" and has_store) else None


def check_loader(trainer: Any, loader: Loader | None) -> None:
    """A :class:`ConfigError` for what our batches and gradients cannot follow, before anything is attached."""
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"one process would train on copies of the model, which have no dropout attached (got {trainer.args.n_gpu} "
            "devices); start it with torchrun, or show it one device by CUDA_VISIBLE_DEVICES"
        )
    processes = trainer.accelerator.num_processes
    if processes != max(ranks.launched()[1], ranks.world_size()):
        raise ConfigError(
            f"this process would train by itself (got {ranks.launched()[1]} process(es) from the launcher and {processes} "
            "in accelerate); on CPUs set use_cpu=True in the training arguments"
        )
    _check_sharding(trainer)
    if loader is None:
        return
    data, parallel = trainer.train_dataset, getattr(trainer.accelerator, "parallelism_config", None)
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise ConfigError(
            f"loader='hiddenkey' chooses rows by number (got {type(data).__name__}, which is read from front to end); "
            "give a data set with rows, or use loader='stock'"
        )
    if order_of(trainer.args) == "group_by_length" and len(data) and not _knows_lengths(data, trainer.args):
        raise ConfigError(
            f"loader='hiddenkey' sorts by lengths that it is told (got train_sampling_strategy='group_by_length' and "
            f"{len(data)} rows without); give a column {trainer.args.length_column_name!r}, or leave the strategy out"
        )
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(
                f"loader='hiddenkey' shares batches over data-parallel ranks (got {name}={getattr(parallel, name)}); "
                "use loader='stock'"
            )
    for name, (wrong, why) in _CONTRADICTIONS.items():
        if any(getattr(part, name, None) is wrong for part in (trainer.args, trainer.args.accelerator_config)):
            raise ConfigError(f"{name} {why} (got {wrong}); leave it {not wrong} with loader='hiddenkey'")


_CONTRADICTIONS = {
    "ignore_data_skip": (True, "would train on an epoch's first batches again, where finding the place costs nothing"),
    "auto_find_batch_size": (True, "would change the global batch on its way"),
    "dataloader_in_order": (False, "would mix the micro-batches of steps, and lose some at a resumption"),
    "dispatch_batches": (True, "would make all batches on one rank, where each makes its own"),
    "split_batches": (True, "would cut a global batch otherwise than it is shared out"),
}
"""Of the training arguments or of their accelerator_config: what goes against our batches, and why."""


def _check_sharding(trainer: Any) -> None:
    wanted = trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if wanted and not trainer.is_fsdp_enabled:
        raise ConfigError(
            f"accelerate does not shard here, it would train without FSDP (got device {trainer.args.device.type!r}, "
            f"{trainer.accelerator.num_processes} process(es)); start it with torchrun on accelerators, or leave fsdp out"
        )
    version = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "fsdp_version", 2)
    if trainer.is_fsdp_enabled and version != 2:
        raise ConfigError(
            f"FSDP's first version flattens weights, so that a head cannot be run in pieces (got version {version}); set "
            "fsdp_config={'version': 2}"
        )


def stream_of(trainer: Any, loader: Loader) -> Stream:
    """The batches of the trainer's data set, shared over its ranks."""
    data, args, accelerator = trainer.train_dataset, trainer.args, trainer.accelerator
    processes, accumulation = accelerator.num_processes, args.gradient_accumulation_steps
    rows = loader.batch_size or trainer._train_batch_size * processes * accumulation
    source = BatchSampler(
        _lengths(data, args),
        batch_size=rows if loader.token_budget is None else None,
        token_budget=loader.token_budget,
        window=loader.window,
        shuffle=loader.shuffle and order_of(args) != "sequential",
        tail=loader.tail or ("drop" if args.dataloader_drop_last else "pad"),  # type: ignore[arg-type]
        seed=args.seed if args.data_seed is None else args.data_seed,
        accumulation=accumulation,
        rank=accelerator.process_index,
        world_size=processes,
    )
    return Stream(source, lambda: trainer.state.global_step)


def streaming(loader: Any, stream: Stream) -> Any:
    """The Trainer's prepared loader with our batches: as it was, but for what accelerate does to share them out."""
    from accelerate.data_loader import DataLoaderShard

    store = is_store(loader.dataset)
    kept = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    return DataLoaderShard(
        loader.dataset if store else PaddedRows(loader.dataset),
        device=loader.device,
        _non_blocking=loader._non_blocking,
        batch_sampler=stream,
        collate_fn=loader.collate_fn if store else Weightless(loader.collate_fn),
        **kept,
    )


_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


class PaddedRows(Dataset[Any]):
    """A map-style data set with a row -1: the first example, with the sample id -1 of a padding row."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name != "set_epoch":  # which a loader calls where there is one
            raise AttributeError(name)
        return self.dataset.set_epoch

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        """The examples of a batch."""
        if list(rows) == [-1]:
            return [{**self.dataset[0], SAMPLE_ID: PaddingId(-1)}]
        if hasattr(self.dataset, "__getitems__"):
            return list(self.dataset.__getitems__(list(rows)))
        return [self.dataset[row] for row in rows]


class Weightless:
    """Any collator; the labels of a padding row carry no loss."""

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """The collator's batch."""
        padding = len(features) == 1 and isinstance(features[0].get(SAMPLE_ID), PaddingId)
        batch = dict(self.collator(features))
        if padding and isinstance(batch.get("labels"), torch.Tensor):
            labels = batch["labels"]
            batch["labels"] = torch.full_like(labels, 0.0 if labels.is_floating_point() else IGNORED)
        return batch


def _lengths(data: Any, args: Any) -> Any:
    """What the sampler knows of a data set: its lengths, by attribute or by the Trainer's column of them, or its size."""
    if not len(data):
        raise DataError("the training set is empty (got 0 examples); check that the data set was read")
    if hasattr(data, "lengths"):
        if len(data.lengths) != len(data):
            raise DataError(
                f"a data set has other lengths than rows (got {len(data.lengths)} for {len(data)}); give one number a row, or "
                "call the attribute otherwise"
            )
        return data
    return np.asarray(_plain(data)[_column(args)][:]) if _knows_lengths(data, args) else len(data)


def _knows_lengths(data: Any, args: Any) -> bool:
    return hasattr(data, "lengths") or _column(args) in (getattr(_plain(data), "column_names", None) or ())


def _plain(data: Any) -> Any:
    return data.dataset if isinstance(data, WithSampleIds) else data


def _column(args: Any) -> str:
    return str(getattr(args, "length_column_name", "length"))


def order_of(args: Any) -> str:
    """How the training arguments want rows drawn: ``"random"``, ``"sequential"`` or ``"group_by_length"``."""
    return str(getattr(args, "train_sampling_strategy", "random"))
