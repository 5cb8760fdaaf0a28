"""A step's mask plan, made where its batch is made: in the loader's worker, while the device computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batches.checks import check_integer
from ..config import HiddenKeyConfig
from ..errors import ConfigError
from ..plan import StepPlan, plan_step


def check_split(
    config: HiddenKeyConfig | str | None, cutter: str = "too_long='split'", instead: str = "too_long='truncate'"
) -> None:
    """Refuse spans for documents that packing splits.

    Args:
        config: as of :func:`hiddenkey_rs.attach`. cutter: what splits them, as the caller wrote it. instead: what does not.

    Raises:
        ConfigError: a site drops spans.
    """
    if not isinstance(config, HiddenKeyConfig):
        config = HiddenKeyConfig() if config is None else HiddenKeyConfig.preset(config)
    for name, part in (("attention", config.attention), ("hidden", config.hidden)):
        if part is not None and part.pattern == "span" and config.drops_by(part):
            raise ConfigError(
                f"a span is drawn in a whole document, and {cutter} cuts documents (got {name} pattern 'span'); "
                f"use {instead}, or another pattern"
            )


@dataclass(frozen=True)
class PlanSpec:
    """What a collator needs to plan the masks of the batches that it makes; see :func:`hiddenkey_rs.plan_step`.

    Attributes:
        config: what to drop, or a preset's name.
        layers, heads, decoder: of the model.
        steps_per_epoch: optimiser steps an epoch, ``BatchSampler.steps``: epoch e's step k is optimiser step
            ``e * steps_per_epoch + k``. Without it only epoch 0 can be planned. (With a token budget epochs differ in
            their number of steps: plan where the step is known.)

    Raises:
        ConfigError: of an unknown preset or a number out of its range.
    """

    config: HiddenKeyConfig | str
    layers: int
    heads: int
    decoder: bool = False
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch is not None:
            check_integer(self.steps_per_epoch, "steps_per_epoch", 1, (1 << 32) - 1, "use BatchSampler.steps")
        plan_step(self.config, 0, [], [], layers=self.layers, heads=self.heads, decoder=self.decoder)

    def plan(self, epoch: int | None, step: int | None, samples: NDArray[Any], lengths: NDArray[Any]) -> StepPlan:
        """The plan of a batch of these documents, in order. ``epoch`` and ``step`` as a batch sampler counts them.

        Raises:
            ConfigError: the batch does not know its step; an epoch past 0 without ``steps_per_epoch``.
        """
        if epoch is None or step is None:
            raise ConfigError(
                "a batch does not know its step (got rows without epoch and step); let BatchSampler choose the rows, or "
                "leave plan= out"
            )
        if epoch and self.steps_per_epoch is None:
            raise ConfigError(
                f"steps_per_epoch is missing (got a batch of epoch {epoch}); set it to BatchSampler.steps"
            )
        known = np.maximum(samples, 0)  # a padding row carries no weight: any mask will do
        number = epoch * (self.steps_per_epoch or 0) + step
        return plan_step(
            self.config, number, known, lengths, layers=self.layers, heads=self.heads, decoder=self.decoder
        )
