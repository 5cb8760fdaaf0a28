"""What a model says to every single example, in the examples' order: what means, tests and bootstraps are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from .features import IGNORED, Example
from .metrics import expected_calibration_error, perplexity, scores
from .tasks import Task

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """Of N examples: task loss (N,), prediction (N,), label (N,), and for classes their probabilities (N, C).

    Of a language model ``loss`` is an example's mean token loss, ``weight`` its number of target tokens, and
    ``predictions`` how many of them it would have said.
    """

    loss: Array
    predictions: Array
    labels: Array
    weight: Array
    probabilities: Array | None = None

    @property
    def correct(self) -> NDArray[np.bool_] | None:
        """(N,): the predicted class is the label; ``None`` where there are no classes."""
        return None if self.probabilities is None else self.predictions == self.labels

    def figures(self, task: Task) -> dict[str, float]:
        """Mean loss, the task's metrics, and of classes the expected calibration error."""
        loss = float(np.average(self.loss, weights=self.weight))
        if task.kind == "lm":
            right = float(self.predictions.sum() / self.weight.sum())
            return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": right}
        found = {"loss": loss, **scores(task, self.predictions, self.labels)}
        if self.probabilities is not None:
            found["ece"] = expected_calibration_error(self.probabilities, self.labels)
        return found


def outcomes(
    model: Any, examples: list[Example], task: Task, collate: Callable[..., Any], batch_size: int, bf16: bool = False
) -> Outcomes:
    """Run the model, without dropout, over ``examples``; results come in their order."""
    # Sorted by length: less padding, and no result depends on it beyond rounding that repeats.
    order = sorted(range(len(examples)), key=lambda n: (len(examples[n]["input_ids"]), n))
    found: list[tuple[torch.Tensor, ...]] = []
    # An encoder-decoder makes its decoder's inputs of the labels.
    whole = task.kind == "lm" and model.config.is_encoder_decoder
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            for start in range(0, len(order), batch_size):
                batch = collate([examples[n] for n in order[start : start + batch_size]])
                labels = batch["labels"].to(model.device)
                inputs = {name: value.to(model.device) for name, value in batch.items() if whole or name != "labels"}
                logits = model(**inputs).logits.float()
                found.append(_judge(logits, labels, task, not model.config.is_encoder_decoder))
    finally:
        model.train(training)
    place = np.argsort(order)
    parts = [torch.cat(part).cpu().numpy().astype(np.float64)[place] for part in zip(*found, strict=True)]
    return Outcomes(*parts)


def _judge(logits: torch.Tensor, labels: torch.Tensor, task: Task, shift: bool) -> tuple[torch.Tensor, ...]:
    rows = torch.ones(len(labels), device=labels.device)
    if task.kind == "regression":
        guess = logits[:, 0]
        return (guess - labels) ** 2, guess, labels, rows
    if task.kind == "classification":
        loss = F.cross_entropy(logits, labels, reduction="none")
        return loss, logits.argmax(dim=-1), labels, rows, logits.softmax(dim=-1)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    carrying = labels != IGNORED
    count = carrying.sum(dim=1)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED).sum(dim=1)
    right = ((logits.argmax(dim=-1) == labels) & carrying).sum(dim=1)
    return loss / count.clamp(min=1), right, labels[:, 0], count
