"""A run's Trainer: its data set, who makes batches of it, its arguments."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batches.schedule import Schedule
from ..config import HiddenKeyConfig
from ..train import Loader
from .extras import extra
from .features import Example
from .job import on_cpus
from .run_config import RunConfig
from .spread import Spread
from .watch import Watcher


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


def common_arguments(config: RunConfig, accumulation: int, steps: int) -> dict[str, Any]:
    """The ``TrainingArguments`` of runs and of a sweep's trials alike. ``steps``: optimiser steps of the whole training."""
    import torch

    return {
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": config.epochs,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": math.ceil(config.warmup * steps),
        "weight_decay": config.weight_decay,
        "label_smoothing_factor": config.label_smoothing,
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": config.bf16,
        "use_cpu": on_cpus(),
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def checkpoint_activations(config: RunConfig, model: Any) -> None:
    """Let the model recompute its activations in backward, if the run asks for it."""
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def make_trainer(
    config: RunConfig,
    spread: Spread,
    examples: list[Example],
    collate: Callable[..., Any],
    model: Any,
    drops: HiddenKeyConfig,
    watcher: Watcher,
) -> Any:
    """The :class:`~hiddenkey_rs.HiddenKeyTrainer` of a run."""
    import transformers

    from ..train import HiddenKeyTrainer

    extra("accelerate")  # the Trainer's, and an extra of ours

    data, loader = training_data(config, spread, examples)
    total = config.max_steps or steps_per_epoch(config, spread, data) * config.epochs
    arguments = transformers.TrainingArguments(
        **common_arguments(config, spread.accumulation, total),
        output_dir=config.out,
        max_steps=config.max_steps or -1,
        save_strategy="epoch" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        # Every pass uses all adapters, unless it leaves out layers by chance.
        ddp_find_unused_parameters=any(getattr(module, "layerdrop", 0) for module in model.modules()),
        **_sharding(config),
    )
    checkpoint_activations(config, model)
    trainer = HiddenKeyTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        config=drops,
        stock_dropout=config.stock,
        loader=loader,
        callbacks=[watcher],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _sharding(config: RunConfig) -> dict[str, Any]:
    """The Trainer's arguments for weights that are spread over ranks."""
    if not config.fsdp:
        return {}
    # Each rank writes its own part of a checkpoint, and any number of ranks reads it.
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
