"""A run's training examples as the Trainer's data set, and who makes batches of them."""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..batches.schedule import Schedule
from ..train import Loader
from .features import Example
from .run_config import RunConfig
from .spread import Spread


class Examples(list[Example]):
    """Examples that know how long they are, and what they are known by."""

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, (examples,): of the longer side, where it has two."""
        sides = ("input_ids", "labels")
        longest = [max(len(e[side]) for side in sides if isinstance(e[side], list)) for e in self]
        return np.array(longest, dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """Of the whole content."""
        return hashlib.blake2b(json.dumps(list(self), sort_keys=True).encode(), digest_size=16).hexdigest()


def training_data(config: RunConfig, spread: Spread, examples: list[Example]) -> tuple[list[Example], Loader | str]:
    """The data set and the ``loader`` of :class:`~hiddenkey_rs.HiddenKeyTrainer`."""
    if spread.loader == "stock":
        return examples, "stock"
    return Examples(examples), Loader(batch_size=spread.rows, token_budget=config.token_budget)


def steps_per_epoch(config: RunConfig, spread: Spread, data: list[Example]) -> int:
    """Optimiser steps of the first epoch."""
    if spread.rows is None:
        return Schedule.of(data, token_budget=config.token_budget, seed=config.seed).steps(0)
    if spread.loader == "hiddenkey":
        return math.ceil(len(data) / spread.rows)
    batches = math.ceil(len(data) / config.batch_size)
    return math.ceil(math.ceil(batches / spread.processes) / spread.accumulation)
