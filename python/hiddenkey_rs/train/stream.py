"""Our batches for the Trainer: its own loader with another batch sampler, which knows its place by the steps trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path

from ..errors import StateError
from ..loading.sampler import BatchSampler

SAMPLER_NAME = "sampler_state.json"
"""In every checkpoint of a training with our loader: which batches they were, and how many were trained on."""


class Stream:
    """Global batches one after the other, over all epochs, as a batch sampler that the Trainer iterates once an epoch.

    Its place is a function of the optimiser steps that are behind, never of what a loader has fetched ahead. The Trainer
    takes every epoch to be as long as the first; with a token budget they differ by a batch or two, so that an epoch of
    the Trainer may begin a little before or after one of the data. No sample is lost or repeated by that.

    Args:
        source: makes the batches; it is moved about.
        done: says how many optimiser steps are behind.
    """

    def __init__(self, source: BatchSampler, done: Callable[[], int]) -> None:
        self._source, self._done = source, done
        self._lengths: list[int] = []
        self.steps = source.schedule.steps(0)
        # Whether the Trainer will leave out what the next iteration has behind it, as it does after resuming.
        self._resumed = False

    def __len__(self) -> int:
        """Micro-batches of an epoch of the Trainer."""
        return self.steps * self._source.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        done, micro = self._done(), self._source.accumulation
        behind, self._resumed = (done % self.steps if self._resumed else 0), False
        epoch, step = self.place(done)
        self._source.set_epoch(epoch)
        self._source.seek(step)
        # An exhausted sampler goes on with its next epoch.
        batches = chain.from_iterable(iter(self._source) for _ in repeat(None))
        # What is behind is left out by counting it: nothing of it is made.
        return chain(repeat([-1], behind * micro), islice(batches, (self.steps - behind) * micro))

    def place(self, done: int) -> tuple[int, int]:
        """(epoch, step in it) of the data after so many optimiser steps."""
        epoch = 0
        while True:
            if epoch == len(self._lengths):
                self._lengths.append(self._source.schedule.steps(epoch))
            if done < self._lengths[epoch]:
                return epoch, done
            done, epoch = done - self._lengths[epoch], epoch + 1

    def save(self, folder: str | Path) -> None:
        """Write the state into a checkpoint, as a whole."""
        epoch, step = self.place(self._done())
        state = {"steps": self._done(), "sampler": self._source.state_dict(epoch=epoch, step=step)}
        temporary = Path(folder) / f".{SAMPLER_NAME}"
        temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        temporary.replace(Path(folder) / SAMPLER_NAME)

    def load(self, folder: str | Path) -> None:
        """Make sure that a checkpoint is of these batches, with any number of ranks and micro-batches.

        Raises:
            StateError: it is not, or its state is damaged.
        """
        file = Path(folder) / SAMPLER_NAME
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            steps, state = saved["steps"], saved["sampler"]
            size = state["batch_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"a sampler's state cannot be read (got {str(file)!r}: {error}); use another checkpoint"
            ) from None
        mine = self._source.schedule.batch_size
        if isinstance(size, int) and mine is not None and size != mine:
            raise StateError(
                f"the checkpoint was trained on global batches of {size} rows (got {mine}); let "
                "per_device_train_batch_size x ranks x gradient_accumulation_steps be "
                f"{size}, or pass loader=Loader(batch_size={size})"
            )
        self._source.load_state_dict(state)
        if type(steps) is not int or steps < 0 or self.place(steps) != (state["epoch"], state["step"]):
            raise StateError(
                f"a sampler's state is damaged (got {steps} steps for step {state['step']} of epoch {state['epoch']}); "
                "use another checkpoint"
            )
        self._resumed = True
