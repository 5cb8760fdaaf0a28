"""One training run from its choices to its folder: data, model, LoRA, dropout, training, evaluation, adapter, picture."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..train import ranks
from . import folder
from .data import Splits, file_splits, hub_splits, subset, task_splits
from .demo_data import demo_splits
from .features import Example, collator, longest_row, tokenise
from .interrupts import interruptible
from .job import job
from .memory import since_start
from .models import add_lora, attention_for, load_adapter, load_model, settle
from .outcomes import outcomes
from .report import curves
from .run_config import RunConfig
from .spread import Spread
from .tasks import TASKS, Task, own_task
from .training import make_trainer
from .watch import RunState, Watcher
from .whole import restore_weights

_PACKAGES = ("hiddenkey_rs", "torch", "transformers", "peft", "accelerate", "numpy")


@dataclass(frozen=True)
class Prepared:
    """A run's task, data and model, ready to train or evaluate."""

    task: Task
    model: Any
    train: list[Example]
    dev: list[Example]
    test: list[Example] | None
    collate: Callable[..., Any]
    labels: tuple[str, ...]


def run(config: RunConfig, resume: bool | str = False) -> dict[str, Any]:
    """Train, and write the run's folder. Returns what ``metrics.json`` holds.

    Everything that can be wrong with the choices, the data or the folder is found before anything is written. On several
    processes (torchrun, accelerate launch) they share the work, and the first alone writes.

    Args:
        config: the choices.
        resume: go on with the stopped run in its folder; ``"auto"``: if there is one, else start.

    Raises:
        HiddenKeyError: on every process, of the first that failed.
    """
    started = time.perf_counter()
    with job():
        return _run(config, resume, started)


def _run(config: RunConfig, resume: bool | str, started: float) -> dict[str, Any]:
    out = Path(config.out)
    with ranks.together():
        if resume == "auto" and (out / folder.METRICS).is_file():
            return dict(folder.load_metrics(out, config))
        fresh = not folder.was_started(out)
        spread, checkpoint = _begin(config, out, resume)
        drops = config.drops()
        settle(config.threads, config.bf16)
        prepared = prepare(config)
        model = add_lora(
            prepared.model,
            prepared.task,
            config.rank,
            config.lora_alpha,
            config.lora_dropout,
            config.target_modules,
            config.seed,
        )
        state = RunState() if checkpoint is None else RunState.load(checkpoint)
        watcher = Watcher(out, prepared.task, state, _evaluation(config, prepared, model), model, config.log_masks)
        trainer = make_trainer(config, spread, prepared.train, prepared.collate, model, drops, watcher)
        watcher.handle = trainer.handle
    if watcher.first:
        out.mkdir(parents=True, exist_ok=True)
    with folder.locked(out) if watcher.first else nullcontext():
        if watcher.first and checkpoint is None:
            if fresh:
                folder.check_free(out)  # once more: another run may have begun while the model was loaded
            folder.clear_start(out)
            folder.write_json(out / folder.CONFIG, _recorded(config, spread, trainer))
        elif watcher.first and checkpoint is not None:
            step = int(checkpoint.name.rpartition("-")[2])
            folder.keep_lines_to(out / folder.LOG, step, evaluated=state.evaluated(step))
            folder.keep_lines_to(out / folder.MASKS, step - 1, evaluated=True)  # steps count from 0 there
        try:
            with interruptible() as watcher.check_interrupt:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            trainer.handle.detach()
        metrics = _metrics(config, prepared, state, trainer, spread, started)
        if watcher.first:
            folder.write_json(out / folder.METRICS, metrics)
            title = f"{_name(config)} on {prepared.task.name}"
            curves({_name(config): state.history}, prepared.task.metric, out / folder.CURVES, title)
    return metrics


def _begin(config: RunConfig, out: Path, resume: bool | str) -> tuple[Spread, Path | None]:
    """How the run is spread, and the checkpoint that it goes on from, if it does."""
    processes = ranks.world_size()
    if not resume or (resume == "auto" and not folder.was_started(out)):
        config.check()
        folder.check_free(out)
        return Spread.of(config, processes), None
    if resume == "auto":  # it may have been stopped before its first checkpoint: then it starts anew
        folder.check_choices(out, config)
    else:
        folder.check_resumable(out, config)
    spread = folder.load_spread(out).again(config, folder.load_config(out), processes)
    return spread, folder.last_checkpoint(out)


def prepare(config: RunConfig) -> Prepared:
    """Load and tokenise the data and load the base model."""
    task, splits = load_splits(config)
    attention = attention_for(config.bf16, config.max_length or task.max_length)
    model, tokenizer = load_model(config.model, task, config.seed, attention)
    length = longest_row(config.max_length, task, model)

    def examples(rows: list[Any]) -> list[Example]:
        return tokenise(rows, task, tokenizer, length, model.config.is_encoder_decoder)

    dev = splits.dev[: config.dev_rows] if config.dev_rows else splits.dev
    test = examples(splits.test) if splits.test else None
    collate = collator(tokenizer, task.kind)
    return Prepared(task, model, examples(splits.train), examples(dev), test, collate, splits.labels)


def load_splits(config: RunConfig) -> tuple[Task, Splits]:
    """The task and its rows, from whichever source the run names; of the training rows as many as it asks for."""
    task, splits = _all_rows(config)
    if config.train_size is not None:
        splits = replace(splits, train=subset(splits.train, config.train_size, config.seed))
    return task, splits


def _all_rows(config: RunConfig) -> tuple[Task, Splits]:
    if config.task == "demo":
        return TASKS["demo"], demo_splits(seed=0)
    if config.task is not None:
        return TASKS[config.task], task_splits(TASKS[config.task], config.data)
    name = Path(config.train_file or str(config.dataset)).name
    task = own_task(name, config.text_fields, config.kind, config.label_field, num_labels=0)
    if config.train_file is not None:
        splits = file_splits(task, config.train_file, config.dev_file, config.test_file, config.seed)
    else:
        splits = hub_splits(task, str(config.dataset), config.dataset_config, config.seed)
    return own_task(name, config.text_fields, config.kind, config.label_field, len(splits.labels)), splits


def evaluate_run(out: Path) -> dict[str, Any]:
    """Development and test figures of a run's adapter, computed anew from its folder."""
    config = folder.load_config(out)
    if not folder.put_back(out / folder.ADAPTER).is_dir():
        raise ConfigError(f"the run has no adapter yet (got {str(out)!r}); let it finish an epoch")
    settle(config.threads, config.bf16)
    prepared = prepare(config)
    model = load_adapter(prepared.model, out / folder.ADAPTER)
    found = {"dev": _figures(model, prepared.dev, prepared, config)}
    if prepared.test is not None:
        found["test"] = _figures(model, prepared.test, prepared, config)
    return {"task": prepared.task.name, "metric": prepared.task.metric, **found}


def _figures(model: Any, examples: list[Example], prepared: Prepared, config: RunConfig) -> dict[str, float]:
    found = outcomes(model, examples, prepared.task, prepared.collate, config.eval_batch_size)
    return found.figures(prepared.task)


def _evaluation(config: RunConfig, prepared: Prepared, model: Any) -> Callable[[], dict[str, dict[str, float]]]:
    total = len(prepared.train)
    rows = min(config.train_eval_rows or total, total)
    seen = [prepared.train[n * total // rows] for n in range(rows)]  # the same rows each epoch, spread over the set

    def both() -> dict[str, dict[str, float]]:
        parts = {"train": seen, "dev": prepared.dev}
        return {name: _figures(model, part, prepared, config) for name, part in parts.items()}

    return both


def _metrics(
    config: RunConfig, prepared: Prepared, state: RunState, trainer: Any, spread: Spread, started: float
) -> dict[str, Any]:
    model, steps = trainer.model, trainer.state.global_step
    best = state.best(prepared.task)
    for number, entry in enumerate(state.history):
        entry["best"] = number == best
    top, last = state.history[best], state.history[-1]
    test = {}
    if prepared.test is not None:
        ranks.wait()  # for the first to have written it
        restore_weights(model, Path(config.out) / folder.ADAPTER)
        test = _figures(model, prepared.test, prepared, config)
    rows = steps * spread.rows if spread.rows else (trainer.state.epoch or 0) * len(prepared.train)
    return {
        "task": prepared.task.name,
        "model": config.model,
        "preset": config.preset if config.hiddenkey is None else config.hiddenkey,
        "seed": config.seed,
        "best_epoch": top["epoch"],
        "train": top["train"],
        "dev": top["dev"],
        "test": test,
        "last": {name: last[name] for name in ("epoch", "step", "train", "dev")},
        "history": state.history,
        "realised_rates": {site: sum(values) / len(values) for site, values in state.rates.items()},
        "labels": list(prepared.labels),
        "examples_per_second": rows / max(state.training_seconds, 1e-9),
        "seconds": time.perf_counter() - started,
        "peak_rss_mb": since_start(),
    }


def _recorded(config: RunConfig, spread: Spread, trainer: Any) -> dict[str, Any]:
    import torch

    return {
        "run": config.to_dict(),
        "spread": spread.to_dict(),
        "hiddenkey": trainer.handle.config.to_dict(),
        "report": trainer.handle.report().as_dict(),
        "versions": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(trainer.args.device),
        "torch_threads": torch.get_num_threads(),
    }


def _name(config: RunConfig) -> str:
    base = config.preset if config.hiddenkey is None else Path(config.hiddenkey).stem
    return base if not config.lora_dropout else f"{base} + lora_dropout {config.lora_dropout:g}"
