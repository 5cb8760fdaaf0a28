"""What a batch's loss is about: its targets, how many of them count, and the rows that the consistency term compares.

Classes of a row or of every token that carries loss, an answer's start and end, or, for regression, what its head receives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import losses
from ..config import Consistency
from ..errors import ConfigError
from .families import FAMILIES

if TYPE_CHECKING:
    from .handle import Handle


_NEXT_TOKEN = ("CausalLM", "LMHead", "DoubleHeads", "ConditionalGeneration")
"""Heads that predict the next token."""
_ENDS = ("start_positions", "end_positions")
_NOWHERE = -1e30
"""A logit without weight: subtracting any number from it changes no bit, so that it adds nothing to a divergence."""


def answers(batch: dict[str, Any]) -> bool:
    """Whether the batch is one of question answering."""
    return batch.get("labels") is None and all(batch.get(name) is not None for name in _ENDS)


def targets(batch: dict[str, Any]) -> Tensor | None:
    """What the task's loss compares with: labels, or where answers start and end, (B, 2); ``None`` without them."""
    return torch.stack([batch[name].flatten() for name in _ENDS], dim=1) if answers(batch) else batch.get("labels")


def answer_logits(outputs: Any) -> Tensor:
    """Of starts and ends: (B, 2, L)."""
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=1)


def answered(batch: dict[str, Any], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, 2, L) -> those of the starts and ends that lie in the input, (N, L), and where they are, (N,).

    Others (the answer was cut off) carry no loss, as in transformers.
    """
    places = targets(batch)
    assert places is not None
    places = places.clamp(min=0)
    inside = places < logits.shape[-1]
    return logits[inside], places[inside]


def answer_loss(batch: dict[str, Any], outputs: Any) -> Tensor:
    """Mean cross-entropy of starts and ends, as transformers' where as many of both lie in the input."""
    rows, places = answered(batch, answer_logits(outputs))
    return F.cross_entropy(rows.float(), places)


def count_items(handle: Handle, batch: dict[str, Any]) -> Any:
    """How many rows of the batch carry loss: examples, starts and ends, or target tokens that are not masked (-100)."""
    labels, ids = targets(batch), batch.get("sample_id")
    if labels is None or (ids is not None and ids.numel() == 1 and int(ids) < 0):
        return 0
    if answers(batch):
        tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
        return (labels < tokens.shape[1]).sum()
    if labels.is_floating_point() or (labels.dim() == 2 and is_for("SequenceClassification", handle.base)):
        return labels.shape[0]
    return (labels[:, 1:] if labels.dim() == 2 and shifts_labels(handle) else labels).ne(losses.IGNORED).sum()


def shifts_labels(handle: Handle) -> bool:
    """Whether the head predicts the next token: labels then stand one position ahead of logits."""
    family = FAMILIES.get(handle.base.config.model_type)
    if family is not None and family.encoder_decoder:  # of their decoders alone, too, which take labels as they are
        return False
    return any(is_for(part, handle.base) for part in _NEXT_TOKEN)


def is_for(task: str, model: nn.Module) -> bool:
    """Whether the model, or a class that its own was made of, is named for a task, as transformers' heads are."""
    return any(task in kind.__name__ for kind in type(model).__mro__)


def compares_features(handle: Handle) -> bool:
    """Whether the consistency term compares what a regression head receives, softmax over its features."""
    part = handle.config.consistency
    return part is not None and part.kind != "mse" and _regression(handle)


def check_classes(handle: Handle) -> None:
    """A :class:`ConfigError` where the consistency term would compare what is no distribution over classes."""
    # Asked again with every batch: transformers finds the type out by the labels of the first one.
    if handle.config.consistency is not None and handle.base.config.problem_type == "multi_label_classification":
        raise ConfigError(
            "a consistency term compares distributions over classes, and a multi-label head has none "
            "(got problem_type 'multi_label_classification'); set consistency=None"
        )


def _regression(handle: Handle) -> bool:
    config = handle.base.config
    return bool(config.problem_type == "regression" or (config.problem_type is None and _single_output(handle)))


def _single_output(handle: Handle) -> bool:
    return is_for("SequenceClassification", handle.base) and handle.base.config.num_labels == 1


def check_kind(handle: Handle, part: Consistency) -> None:
    """Raises ConfigError if the term is not one for what the model puts out."""
    if part.kind == "mse" and not _regression(handle):
        raise ConfigError(
            "mean squared error compares the outputs of a regression head (got consistency kind 'mse' for another "
            "task); use kind='kl'"
        )


def compared_rows(
    handle: Handle, part: Consistency, batch: dict[str, Any], outputs: Any, features: Tensor | None
) -> Tensor:
    """The rows whose distributions (or values, for ``mse``) the consistency term compares: (N, classes)."""
    check_classes(handle)
    if compares_features(handle):
        return _pooled(handle, batch, features)
    check_kind(handle, part)
    if answers(batch):
        return _answers(batch, outputs)
    logits = outputs.logits if "logits" in outputs else None
    per_token = batch["labels"].dim() == 2 and not is_for("SequenceClassification", handle.base)
    if logits is None or (per_token and logits.dim() == 2):
        raise ConfigError(
            f"a consistency term needs logits of classes (got {type(outputs).__name__} of {type(handle.base).__name__} "
            "without them); set consistency=None for this head, or return_dict=True if it was set to False"
        )
    if logits.dim() == 2:
        return logits
    return losses.token_rows(logits, batch["labels"], shift=shifts_labels(handle))


def _answers(batch: dict[str, Any], outputs: Any) -> Tensor:
    """Where answers start and end, each a distribution over its row's real tokens: (N, L)."""
    logits = answer_logits(outputs).float()
    real = batch.get("attention_mask")
    if real is not None:
        logits = logits.masked_fill(real[:, None].eq(0), _NOWHERE)
    return answered(batch, logits)[0]


def _pooled(handle: Handle, batch: dict[str, Any], features: Tensor | None) -> Tensor:
    """Regression compares the pooled last-layer representation: what the head receives, or the token it will take."""
    if features is None:
        raise ConfigError(
            f"the regression head was not found, so there is no representation to compare (got "
            f"{type(handle.base).__name__}); use Consistency(kind='mse')"
        )
    if features.dim() == 2:
        return features
    if getattr(handle.base.config, "classifier_pooling", None) == "late":  # EuroBERT: every token's, then their mean
        mask = batch.get("attention_mask")
        weights = torch.ones_like(features[..., :1]) if mask is None else mask[..., None].to(features.dtype)
        return (features * weights).sum(dim=1) / weights.sum(dim=1)
    if handle.stacks[-1].role == "encoder":
        return features[:, 0]
    # As transformers' heads choose: the last token that is not padding, which they know by its id.
    ids, padding = batch.get("input_ids"), handle.base.config.get_text_config().pad_token_id
    if ids is None or padding is None or features.shape[1] != ids.shape[1]:  # a prompt stands before them
        return features[:, -1]
    places = torch.arange(ids.shape[1], device=ids.device) * ids.ne(padding)
    return features[torch.arange(len(features), device=ids.device), places.argmax(dim=1)]
