"""A store's batches as an ordinary ``DataLoader``, of which every rank and worker is told only what it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..batches.checks import check_integer
from ..batches.schedule import Tail
from ..errors import ConfigError, HiddenKeyError
from ..masks import set_num_threads
from .collator import Collator
from .sampler import BatchSampler, Cursor
from .workers import LostWorkerError


class ShardedLoader(DataLoader[Any]):
    """A ``DataLoader`` that yields its own rank's micro-batches, so nobody must shard it again.

    ``accelerate.Accelerator.prepare`` would: it deals whole batches to ranks in turn, and repeats the first ones at the
    end. It leaves alone what says that it is prepared, so this loader says so; once it was asked, batches are moved to
    accelerate's device, as its own loaders would do.
    """

    batch_sampler: BatchSampler  # type: ignore[assignment]
    device: torch.device | None = None
    """Where batches are moved to. None: they stay where they are made."""

    @property
    def _is_accelerate_prepared(self) -> bool:
        if self.device is None:
            from accelerate import PartialState  # whoever asks is accelerate

            self.device = PartialState().device
        return True

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, value: bool) -> None:
        """Accelerate marks what it holds; this loader is marked already."""

    def __iter__(self) -> Any:
        if not self.num_workers:
            batches = super().__iter__()
            return batches if self.device is None else self._delivered(batches)
        with self.batch_sampler.running_ahead():  # workers are told rows as soon as the iterator is made
            batches = super().__iter__()
        return self._delivered(batches, self.batch_sampler.cursor)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; see :meth:`BatchSampler.set_epoch`."""
        self.batch_sampler.set_epoch(epoch)

    def _delivered(self, batches: Iterator[Any], cursor: Cursor | None = None) -> Iterator[Any]:
        """The batches, moved; and one error for a lost worker, which torch shows as whatever it was doing just then."""
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                if cursor is not None:
                    self.batch_sampler.finish(cursor)
                return
            except (EOFError, ConnectionError, RuntimeError) as error:
                if not _tells_of_death(error):
                    raise
                text = str(error) or type(error).__name__
                raise LostWorkerError(
                    f"a worker of the loader died (got {text!r}); if memory ran out, use fewer workers or none"
                ) from None
            yield batch if self.device is None else {name: self._put(value) for name, value in batch.items()}

    def _put(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=self.pin_memory) if isinstance(value, Tensor) else value


def build_dataloader(
    store: Any,
    *,
    batch_size: int | None = None,
    token_budget: int | None = None,
    collator: Callable[[Any], dict[str, Any]] | None = None,
    accumulation: int = 1,
    rank: int | None = None,
    world_size: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    window: int | None = None,
    tail: Tail = "pad",
    num_workers: int = 0,
    multiprocessing_context: Any = None,
    pin_memory: bool | None = None,
    prefetch_factor: int | None = None,
    persistent_workers: bool = False,
    worker_init_fn: Callable[[int], None] | None = None,
    timeout: float = 0,
    stateful: bool = False,
) -> ShardedLoader:
    """A loader of this rank's micro-batches.

    What a step's batch holds depends on data, seed, epoch and batch size only: never on ranks, micro-batches or workers.
    Batches are so cheap to make that workers seldom pay; where they are used, they are given row numbers, not rows.

    Args:
        store: a :class:`TokenStore` or a :class:`PackedStore`.
        batch_size: examples of a step, all ranks and micro-batches together. token_budget: instead, its most tokens.
        collator: default: a :class:`Collator` of the layout that goes with the store, padding with id 0.
        accumulation: micro-batches of a step on each rank.
        rank, world_size: default: those of ``torch.distributed``, else ``RANK`` and ``WORLD_SIZE`` of the environment,
            else one process.
        seed, epoch, shuffle, window, tail: see :class:`BatchSampler`, which is the loader's ``batch_sampler``.
        num_workers, multiprocessing_context, prefetch_factor, persistent_workers, worker_init_fn, timeout: as of torch's
            ``DataLoader``; without workers the start method is not looked at.
        pin_memory: whether batches are copied into page-locked memory. Default: where there is CUDA.
        stateful: a torchdata ``StatefulDataLoader``, with ``state_dict()`` and ``load_state_dict()``. Its state is
            that of :class:`BatchSampler` after what was delivered (prefetched batches do not count), so it goes on with
            any number of ranks, micro-batches and workers. It counts whole steps: taken within a step it leads back to
            the step's first micro-batch, as the gradients of those before are gone, too.

    Returns:
        A ``DataLoader``; see :class:`Collator` for its batches. ``set_epoch`` goes to an epoch's start; an iteration that
        was not broken off is followed by the next epoch. The global random state of torch is left alone.

    Raises:
        ConfigError: arguments out of range, or at odds with one another. DataError: a length that the sampler refuses.
        HiddenKeyError: ``stateful`` without torchdata.

    Example:
        >>> import numpy as np
        >>> from hiddenkey_rs import TokenStore
        >>> store = TokenStore((np.arange(1, 13), np.array([0, 3, 5, 9, 12])))
        >>> loader = build_dataloader(store, batch_size=2, rank=0, world_size=1)
        >>> [tuple(batch["input_ids"].shape) for batch in loader]
        [(2, 3), (2, 4)]
    """
    if not hasattr(store, "lengths") or not hasattr(store, "__getitems__"):
        raise ConfigError(f"a loader needs a store (got {type(store).__name__}); make a TokenStore of the data")
    rank, world_size = _place(rank, world_size)
    sampler = BatchSampler(
        store,
        batch_size=batch_size,
        token_budget=token_budget,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=seed,
        epoch=epoch,
        shuffle=shuffle,
        window=window,
        tail=tail,
    )
    workers = check_integer(num_workers, "num_workers", 0, 1024, "0 makes batches in this process")
    options: dict[str, Any] = {
        "batch_sampler": sampler,
        "collate_fn": Collator(layout="packed" if hasattr(store, "packing") else "padded")
        if collator is None
        else collator,
        "num_workers": workers,
        "multiprocessing_context": multiprocessing_context if workers else None,
        "pin_memory": torch.cuda.is_available() if pin_memory is None else pin_memory,
        "prefetch_factor": prefetch_factor,
        "persistent_workers": persistent_workers,
        "worker_init_fn": partial(_start_worker, worker_init_fn),
        "timeout": timeout,
        # Every iteration draws a number; from the global generator it would shift what the model draws next.
        "generator": torch.Generator().manual_seed(seed),
    }
    try:
        return _class(stateful)(store, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the loader's options do not fit (got {error}); see torch.utils.data.DataLoader") from None


def _class(stateful: bool) -> type[ShardedLoader]:
    if not stateful:
        return ShardedLoader
    try:
        from .stateful import StatefulLoader
    except ImportError as error:
        raise HiddenKeyError(
            f"a stateful loader needs the package torchdata (got {error}); pip install torchdata"
        ) from None
    return StatefulLoader


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size), asked of torch or the environment where they are not given."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        found = distributed.get_rank(), distributed.get_world_size()
    else:
        found = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
    return found[0] if rank is None else rank, found[1] if world_size is None else world_size


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"{name} of the environment is no number (got {text!r}); unset it, or start with torchrun")
    return int(text)


def _tells_of_death(error: Exception) -> bool:
    """Whether the error is the loader's own: what a worker's code raised comes as "Caught ... in DataLoader worker"."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return not str(error).startswith("Caught ")


def _start_worker(also: Callable[[int], None] | None, worker: int) -> None:
    """Run first in each worker: one thread each, as torch does; the processors are shared out among workers already."""
    set_num_threads(1)
    if also is not None:
        also(worker)
