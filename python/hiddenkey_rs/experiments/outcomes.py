"""What a model says to every single example, in the examples' order: what means, tests and bootstraps are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ..train import ranks
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
    """Run the model, without dropout, over ``examples``; results come in their order, and on every rank: they share the work."""
    # Sorted by length: less padding, and no result depends on it beyond rounding that repeats.
    order = sorted(range(len(examples)), key=lambda n: (len(examples[n]["input_ids"]), n))
    # An encoder-decoder makes its decoder's inputs of the labels.
    whole = task.kind == "lm" and model.config.is_encoder_decoder

    def judged(start: int) -> tuple[Array, ...]:
        batch = collate([examples[n] for n in order[start : start + batch_size]])
        labels = batch["labels"].to(model.device)
        inputs = {name: value.to(model.device) for name, value in batch.items() if whole or name != "labels"}
        found = _judge(model(**inputs).logits.float(), labels, task, not model.config.is_encoder_decoder)
        return tuple(part.cpu().numpy().astype(np.float64) for part in found)

    training = model.training
    model.eval()
    try:
        # Not inference_mode: weights that are gathered inside would be unfit for training.
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            found = _shared(range(0, len(order), batch_size), judged)
    finally:
        model.train(training)
    place = np.argsort(order)
    return Outcomes(*(np.concatenate(part)[place] for part in zip(*found, strict=True)))


def _shared(starts: range, work: Callable[[int], tuple[Array, ...]]) -> list[tuple[Array, ...]]:
    """``work`` on every batch, shared out over ranks; all results, in the batches' order, on every rank."""
    mine = list(starts[ranks.rank() :: ranks.world_size()])
    # Weights may have to be gathered for every pass, so all ranks run as many: where one is missing, the first batch again.
    extra = [0] * (-(-len(starts) // ranks.world_size()) - len(mine))
    found = [(start, work(start)) for start in mine + extra]
    every = dict(pair for share in ranks.gather(found[: len(mine)]) for pair in share)
    return [every[start] for start in starts]


def _judge(logits: torch.Tensor, labels: torch.Tensor, task: Task, shift: bool) -> tuple[torch.Tensor, ...]:
    rows = torch.ones(len(labels), device=labels.device)
    if task.kind == "regression":
        guess = logits[:, 0]
        return (guess - labels) ** 2, guess, labels, rows
    if task.kind == "classification":
        loss = F.cross_entropy(logits, labels, reduction="none")
        return loss, logits.argmax(dim=-1), labels, rows, logits.softmax(dim=-1)
    if shift:  # the labels, not the logits: of those a part would have to be copied
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    carrying = labels != IGNORED
    count = carrying.sum(dim=1)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    loss = loss.view_as(labels).sum(dim=1)
    right = ((logits.argmax(dim=-1) == labels) & carrying).sum(dim=1)
    return loss / count.clamp(min=1), right, labels[:, 0], count
