"""One trial: fit on a subset, look at every epoch at what was held back, and leave one line."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import torch
import transformers

from ...train import HiddenKeyTrainer
from ..controls import drop_ranks, set_stock_rate
from ..data import Splits, task_splits
from ..demo_data import demo_splits
from ..features import Example, collator, longest_row, tokenise
from ..generation import Group, grouped
from ..models import add_lora, attention_for, load_model, settle
from ..provenance import commit, processor, versions
from ..run_config import RunConfig
from ..tasks import TASKS, Task
from ..training import checkpoint_activations, common_arguments
from .lines import ResultLine
from .plan import FINAL, SEARCH, Trial
from .selection import chosen_epoch, drawn_sources, split_rows
from .texts import generate_texts
from .watching import DivergedTrialError, Watcher

_PACKAGES = ("hiddenkey_rs", "torch", "transformers", "peft", "accelerate", "numpy")


def run_trial(trial: Trial, plan: str, command: str, threads: int | None = None) -> ResultLine:
    """Run a trial to its line. A loss that becomes NaN is a line with ``status="failed"`` and the step.

    Args:
        trial: what to run. plan: the plan's digest. command: how to run this trial alone, for the record.
        threads: of torch; default: as it is.

    Raises:
        HiddenKeyError: data or model that are missing or do not fit.
    """
    started = time.perf_counter()
    settle(threads, trial.config.bf16)
    warnings.filterwarnings("ignore", message="the model keeps its own dropout")
    task = TASKS[str(trial.config.task)]
    prepared = _prepare(trial, task)
    watcher = Watcher(trial, task, prepared.model, prepared.parts, prepared.collate)
    trainer = _trainer(trial.config, prepared, watcher)
    failure: DivergedTrialError | None = None
    try:
        trainer.train()
    except DivergedTrialError as diverged:
        failure = diverged
    finally:
        trainer.handle.detach()
    history = watcher.history
    chosen = chosen_epoch(history, task, trial.protocol.select_by) if history else 0
    texts: dict[str, Any] = {}
    if failure is None and prepared.groups:
        watcher.restore_best()
        texts = generate_texts(prepared.model, prepared.tokenizer, prepared.groups, task, trial.config.bf16)
        history[chosen]["report"] |= texts.pop("figures")
        texts |= prepared.drawn
    return ResultLine(
        id=trial.id,
        plan=plan,
        stage=trial.stage,
        task=trial.task,
        dataset=task.name,
        train_size=len(prepared.parts["train"]),
        method=trial.method,
        setting=dict(trial.setting),
        rank=trial.config.rank,
        seed=trial.seed,
        status="done" if failure is None else "failed",
        error=None if failure is None else str(failure),
        step=None if failure is None else failure.step,
        metric=task.metric,
        lower_is_better=task.lower_is_better,
        history=history,
        chosen=chosen,
        examples={} if failure else watcher.packed(),
        texts=texts,
        seconds=round(time.perf_counter() - started, 3),
        seconds_per_step=round(watcher.training_seconds / max(watcher.steps, 1), 6),
        peak_rss_mb=None if watcher.memory.mib is None else round(watcher.memory.mib, 1),
        peak_of=watcher.memory.of,
        examples_per_second=round(watcher.rows / max(watcher.training_seconds, 1e-9), 3),
        realised_rates={site: round(fmean(rates), 6) for site, rates in watcher.rates.items()},
        config=_changed(trial.config),
        command=command,
        versions=versions(_PACKAGES),
        machine=f"{processor()}, {torch.get_num_threads()} thread(s)",
        commit=commit(),
    )


@functools.lru_cache(maxsize=1)
def _splits(task: str, data: str | None) -> Splits:
    """One task's rows are read once for all of a process' trials on it."""
    return demo_splits(seed=0) if task == "demo" else task_splits(TASKS[task], data)


@dataclass(frozen=True)
class _Prepared:
    """``parts``: examples by what they are for. ``groups``: what texts are generated for, where any are.

    ``drawn``: of which split the groups are, and of how many, for the line.
    """

    model: Any
    tokenizer: Any
    parts: dict[str, list[Example]]
    collate: Callable[..., Any]
    groups: list[Group]
    drawn: dict[str, Any]


def _prepare(trial: Trial, task: Task) -> _Prepared:
    config, controls = trial.config, trial.controls
    splits = _splits(task.name, config.data)
    fit, choose, report = split_rows(splits, trial.train_size, trial.protocol, trial.seed, task.unit)
    attention = attention_for(config.bf16, config.max_length or task.max_length)
    model, tokenizer = load_model(config.model, task, config.seed, attention)
    length = longest_row(config.max_length, task, model)
    if controls.stock_rate is not None:
        set_stock_rate(model, controls.stock_rate)
    rows = {"train": fit, "select": choose} | ({} if trial.stage == SEARCH else {"report": report})
    parts = {
        name: tokenise(part, task, tokenizer, length, model.config.is_encoder_decoder) for name, part in rows.items()
    }
    groups: list[Group] = []
    drawn: dict[str, Any] = {}
    if task.source is not None and trial.stage == FINAL:
        known = grouped(splits.test or report, task)
        groups = drawn_sources(known, trial.protocol.generate)
        drawn = {"split": "test" if splits.test else "dev", "of": len(known)}
    model = add_lora(
        model, task, config.rank, config.lora_alpha, config.lora_dropout, config.target_modules, config.seed
    )
    if controls.rank_dropout:
        drop_ranks(model, controls.rank_dropout)
    return _Prepared(model, tokenizer, parts, collator(tokenizer, task.kind), groups, drawn)


def _trainer(config: RunConfig, prepared: _Prepared, watcher: Watcher) -> Any:
    train = prepared.parts["train"]
    steps = config.epochs * math.ceil(math.ceil(len(train) / config.batch_size) / config.accumulation)
    checkpoint_activations(config, prepared.model)
    trainer = HiddenKeyTrainer(
        model=prepared.model,
        args=transformers.TrainingArguments(
            **common_arguments(config, config.accumulation, steps),
            output_dir="unused",  # nothing is saved
            save_strategy="no",
        ),
        train_dataset=train,
        data_collator=prepared.collate,
        config=config.drops(),
        stock_dropout="keep" if watcher.trial.controls.stock_rate is not None else config.stock,
        callbacks=[watcher],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _changed(config: RunConfig) -> dict[str, Any]:
    """The choices that are not defaults."""
    values = config.to_dict()
    return {f.name: values[f.name] for f in fields(config) if values[f.name] != f.default and f.name != "data"}
