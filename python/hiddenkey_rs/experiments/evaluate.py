"""Losses and metrics of a model on a list of examples: plain task loss, no dropout, exact means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..train import ranks
from .features import IGNORED, Example
from .metrics import perplexity, scores
from .tasks import Task


def evaluate(
    model: Any, examples: list[Example], task: Task, collate: Callable[..., Any], batch_size: int
) -> dict[str, float]:
    """``{"loss": ..., <the task's metrics>}``. The loss is a mean over examples, or over target tokens for ``lm``."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: weights that are gathered inside would be unfit for training
            return (
                _language(model, examples, collate, batch_size)
                if task.kind == "lm"
                else _scored(model, examples, task, collate, batch_size)
            )
    finally:
        model.train(training)


def _shared(
    examples: list[Example], collate: Callable[..., Any], size: int, device: Any, work: Callable[[dict[str, Any]], Any]
) -> Iterator[Any]:
    """``work`` on every batch, shared out over ranks; all results, in the batches' order, on every rank."""
    # Sorted by length: less padding, and no result depends on it beyond rounding that repeats.
    order = sorted(range(len(examples)), key=lambda n: (len(examples[n]["input_ids"]), n))
    starts = range(0, len(order), size)
    mine = list(starts[ranks.rank() :: ranks.world_size()])
    # Weights may have to be gathered for every pass, so all ranks run as many: where one is missing, the first batch again.
    extra = [0] * (-(-len(starts) // ranks.world_size()) - len(mine))
    found = []
    for start in mine + extra:
        batch = collate([examples[n] for n in order[start : start + size]])
        found.append((start, work({name: value.to(device) for name, value in batch.items()})))
    every = dict(pair for share in ranks.gather(found[: len(mine)]) for pair in share)
    return (every[start] for start in starts)


def _scored(
    model: Any, examples: list[Example], task: Task, collate: Callable[..., Any], size: int
) -> dict[str, float]:
    def work(batch: dict[str, Any]) -> tuple[float, Any, Any]:
        output = model(**batch)
        logits = output.logits.float()
        guess = logits[:, 0] if task.kind == "regression" else logits.argmax(dim=-1)
        return float(output.loss) * len(batch["labels"]), guess.cpu().numpy(), batch["labels"].cpu().numpy()

    total, predictions, labels = 0.0, [], []
    for loss, guess, right in _shared(examples, collate, size, model.device, work):
        total += loss
        predictions.append(guess)
        labels.append(right)
    found = scores(task, np.concatenate(predictions), np.concatenate(labels))
    return {"loss": total / len(examples), **found}


def _language(model: Any, examples: list[Example], collate: Callable[..., Any], size: int) -> dict[str, float]:
    shift = not model.config.is_encoder_decoder

    def work(batch: dict[str, Any]) -> tuple[float, int, int]:
        output = model(**batch)
        labels = batch["labels"][:, 1:] if shift else batch["labels"]
        guess = (output.logits[:, :-1] if shift else output.logits).argmax(dim=-1)
        carrying = labels != IGNORED
        count = int(carrying.sum())
        return float(output.loss) * count, int((guess == labels)[carrying].sum()), count

    total, right, tokens = 0.0, 0, 0
    for loss, hits, count in _shared(examples, collate, size, model.device, work):
        total += loss
        right += hits
        tokens += count
    loss = total / max(tokens, 1)
    return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": right / max(tokens, 1)}
