"""Losses and metrics of a model on a list of examples: plain task loss, no dropout, exact means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

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
        with torch.inference_mode():
            return (
                _language(model, examples, collate, batch_size)
                if task.kind == "lm"
                else _scored(model, examples, task, collate, batch_size)
            )
    finally:
        model.train(training)


def _batches(examples: list[Example], collate: Callable[..., Any], size: int, device: Any) -> Iterator[dict[str, Any]]:
    # Sorted by length: less padding, and no result depends on it beyond rounding that repeats.
    order = sorted(range(len(examples)), key=lambda n: (len(examples[n]["input_ids"]), n))
    for start in range(0, len(order), size):
        batch = collate([examples[n] for n in order[start : start + size]])
        yield {name: value.to(device) for name, value in batch.items()}


def _scored(
    model: Any, examples: list[Example], task: Task, collate: Callable[..., Any], size: int
) -> dict[str, float]:
    total, predictions, labels = 0.0, [], []
    for batch in _batches(examples, collate, size, model.device):
        output = model(**batch)
        rows = len(batch["labels"])
        total += float(output.loss) * rows
        logits = output.logits.float()
        guess = logits[:, 0] if task.kind == "regression" else logits.argmax(dim=-1)
        predictions.append(guess.cpu().numpy())
        labels.append(batch["labels"].cpu().numpy())
    found = scores(task.metrics, np.concatenate(predictions), np.concatenate(labels))
    return {"loss": total / len(examples), **found}


def _language(model: Any, examples: list[Example], collate: Callable[..., Any], size: int) -> dict[str, float]:
    total, right, tokens = 0.0, 0, 0
    shift = not model.config.is_encoder_decoder
    for batch in _batches(examples, collate, size, model.device):
        output = model(**batch)
        labels = batch["labels"][:, 1:] if shift else batch["labels"]
        guess = (output.logits[:, :-1] if shift else output.logits).argmax(dim=-1)
        carrying = labels != IGNORED
        count = int(carrying.sum())
        total += float(output.loss) * count
        right += int((guess == labels)[carrying].sum())
        tokens += count
    loss = total / max(tokens, 1)
    return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": right / max(tokens, 1)}
