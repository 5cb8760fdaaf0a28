"""The loss of a step: the gradient pass, the second pass that the consistency term compares it with, and their sum.

Paper, equations 11 (``kl``) and 12 (``js``). The gradient runs through one branch by default; the other branch is
forward only. ``gradient="both"`` (R-Drop) is one pass over a doubled batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import losses
from ..config import Consistency
from ..errors import ConfigError, DataError
from .checks import on_compiled
from .head import Head, token_losses, without_logits
from .sharded import gathered

if TYPE_CHECKING:
    from .handle import Handle


@dataclass(frozen=True, eq=False)
class LossOutput:
    """``loss`` = ``task`` + weight * ``consistency`` (0-dim tensors; only ``loss`` is meant for backward)."""

    loss: Tensor
    task: Tensor
    consistency: Tensor | None
    outputs: Any


TaskLoss = Callable[[Any, Tensor], Tensor]


def compute(
    handle: Handle, model: nn.Module, batch: dict[str, Any], num_items: Any, task_loss: TaskLoss | None = None
) -> LossOutput:
    """Both terms of a batch; see :meth:`Handle.compute`."""
    if batch.get("labels") is None:
        answers = "start_positions" in batch  # of question answering, whose head has no classes to compare either
        mend = (
            "call the model inside handle.step() and take its own loss" if answers else "pass labels=... with the batch"
        )
        raise DataError(f"the loss needs labels (got a batch with {', '.join(batch) or 'nothing'}); {mend}")
    part = handle.config.consistency
    part = None if part is None or part.weight == 0 else part
    idle = handle.session.require_step().idle
    items = 0 if idle else count_items(handle, batch)
    if idle and batch["labels"].dim() == 2 and not batch["labels"].is_floating_point():
        batch = {**batch, "labels": torch.full_like(batch["labels"], losses.IGNORED)}
    if handle.head is not None and task_loss is None and batch["labels"].dim() == 2:
        return _on_tokens(handle, handle.head, model, part, batch, num_items)
    nothing = int(items) == 0  # asked before the passes, so that an accelerator's host waits for the labels alone
    passes = _passes(handle, model, part, batch)
    if nothing:  # a mean over nothing is NaN, and so is its gradient
        zero = 0.0 * passes.outputs.logits.sum()
        return LossOutput(zero, zero.detach(), None if part is None else zero.detach(), passes.outputs)
    per_row = None
    if part is not None and passes.second is not None:
        per_row = losses.consistency(part.kind, passes.first, passes.second, gradient=part.gradient)
    # A mean over this batch's rows (over both branches of a doubled batch: the mean of the two).
    task = passes.outputs.loss if task_loss is None else task_loss(passes.outputs, passes.labels)
    if num_items is not None:
        task = task * (items / num_items)
    if per_row is None or part is None:
        return LossOutput(task, task.detach(), None, passes.outputs)
    consistency = losses.reduce(per_row, num_items)
    loss = task + part.weight * consistency.to(task.dtype)
    return LossOutput(loss, task.detach(), consistency.detach(), passes.outputs)


def _on_tokens(
    handle: Handle, head: Head, model: nn.Module, part: Consistency | None, batch: dict[str, Any], num_items: Any
) -> LossOutput:
    """Both terms from what the vocabulary head received: logits exist for a few loss-bearing tokens at a time."""

    def rows(batch: dict[str, Any], outputs: Any, received: Any) -> tuple[Tensor, Tensor]:
        return losses.labelled_rows(received, batch["labels"], shift=shifts_labels(handle))

    passes = _passes(handle, model, part, batch, rows)
    (first, labels), (second, _) = passes.first, passes.second or (None, None)
    both = part is not None and part.gradient == "both"
    # Where no token carries loss both terms are 0, and not 0 / 0.
    scale = 1 / torch.as_tensor(len(labels) if num_items is None else num_items, device=first.device).clamp(min=1)
    weight = 0.0 if part is None else part.weight
    task_scale = scale / 2 if both else scale
    kind = None if part is None else part.kind
    with gathered(handle.model, head.module) as sharded:
        loss, task, consistency = token_losses(
            head, first, second, labels, kind=kind, both=both, scales=(task_scale, weight * scale)
        )
    if sharded:
        # FSDP gathers weights for backward when it reaches what the model returned: here logits of no token.
        loss = loss + passes.outputs.logits.sum().to(loss.dtype)
    found = None if second is None else (consistency * scale).detach()
    return LossOutput(loss, (task * task_scale).detach(), found, passes.outputs)


@dataclass(frozen=True, eq=False)
class _Passes:
    """What the passes of a batch gave: the rows to compare (``second``: None if there is one pass), outputs, labels."""

    first: Any
    second: Any
    outputs: Any
    labels: Tensor


_ONE_ROW = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Where the documents of a single flat row begin, for FlashAttention: ``position_ids`` say it of any number of rows."""

_Rows = Callable[[dict[str, Any], Any, Any], Any]
_Run = Callable[[dict[str, Any]], tuple[Any, Any]]


def _passes(
    handle: Handle, model: nn.Module, part: Consistency | None, batch: dict[str, Any], rows: _Rows | None = None
) -> _Passes:
    """Run what the consistency term asks for. ``rows`` makes of (batch, outputs, features) what is compared."""
    compiled = on_compiled(model)  # asked once: it walks all modules
    run = partial(_run, handle, model, on_tokens=rows is not None, compiled=compiled)
    if part is None:
        outputs, features = run(batch)
        return _Passes(rows(batch, outputs, features) if rows else None, None, outputs, batch["labels"])
    compared = rows or (lambda batch, outputs, features: _rows(handle, part, batch, outputs, features))
    if part.gradient == "both":
        doubled = {
            name: torch.cat([value, value]) if _per_row(value, batch) else value
            for name, value in batch.items()
            if name not in _ONE_ROW
        }
        with handle.session.branches((0, 1)):
            outputs, features = run(doubled)
        return _halves(compared(doubled, outputs, features), outputs, doubled["labels"])
    if compiled or not handle.sharing.layers:
        # The pass without gradient runs first: only its rows are alive while the gradient pass stores activations.
        second = _second_pass(handle, model, part, batch, compared, run)
        outputs, features = run(batch)
    else:
        with handle.sharing.recording():
            outputs, features = run(batch)
        with handle.sharing.skipping():
            second = _second_pass(handle, model, part, batch, compared, run)
    return _Passes(compared(batch, outputs, features), second, outputs, batch["labels"])


def _halves(rows: Any, outputs: Any, labels: Tensor) -> _Passes:
    """The two branches of a doubled batch."""
    if isinstance(rows, tuple):
        (first, second), (one, two) = (part.chunk(2) for part in rows)
        return _Passes((first, one), (second, two), outputs, labels)
    first, second = rows.chunk(2)
    return _Passes(first, second, outputs, labels)


def _second_pass(
    handle: Handle, model: nn.Module, part: Consistency, batch: dict[str, Any], compared: _Rows, run: _Run
) -> Any:
    with torch.no_grad():
        if part.kind == "js":
            with _evaluating(model):
                return compared(batch, *run(batch))
        with handle.session.branches((1,), force=True):
            return compared(batch, *run(batch))


def _run(
    handle: Handle, model: nn.Module, batch: dict[str, Any], *, on_tokens: bool, compiled: bool
) -> tuple[Any, Tensor | None]:
    """One forward pass, and what the head received where that is compared, or where tokens' losses are made of it."""
    session = handle.session
    session.capture, session.features = _compares_features(handle), None
    session.target_mask = _target_mask(handle, batch)
    try:
        if on_tokens:
            batch = _without_labels(handle, batch)
            with without_logits(handle) as received, session.prepared(batch, compiled):
                outputs = model(**batch)
            return outputs, received[-1]
        with session.prepared(batch, compiled):
            outputs = model(**batch)
        return outputs, session.features
    finally:
        session.capture, session.features, session.target_mask = False, None, None


def _without_labels(handle: Handle, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch for a model that is not to make a loss; an encoder-decoder's inputs come from the labels, as it makes them."""
    rest = {name: value for name, value in batch.items() if name != "labels"}
    if handle.base.config.is_encoder_decoder and rest.get("decoder_input_ids") is None:
        rest["decoder_input_ids"] = handle.base.prepare_decoder_input_ids_from_labels(batch["labels"])
    return rest


def _target_mask(handle: Handle, batch: dict[str, Any]) -> Tensor | None:
    """The targets' real tokens, for an encoder-decoder whose batch brings no decoder mask: up to the last label."""
    labels: Tensor = batch["labels"]
    if (
        not handle.base.config.is_encoder_decoder
        or batch.get("decoder_attention_mask") is not None
        or labels.dim() != 2
    ):
        return None
    return labels.ne(losses.IGNORED).flip(1).cumsum(1).flip(1).ne(0)


def _compares_features(handle: Handle) -> bool:
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
    return "SequenceClassification" in type(handle.base).__name__ and handle.base.config.num_labels == 1


def _rows(handle: Handle, part: Consistency, batch: dict[str, Any], outputs: Any, features: Tensor | None) -> Tensor:
    """The rows whose distributions (or values, for ``mse``) the consistency term compares: (N, classes)."""
    check_classes(handle)
    if _compares_features(handle):
        return _pooled(handle, batch, features)
    logits = outputs.logits if "logits" in outputs else None
    if logits is None:
        raise ConfigError(
            f"a consistency term needs the model's logits (got {type(outputs).__name__} without them); "
            "set consistency=None for this head"
        )
    if part.kind == "mse" and not _regression(handle):
        raise ConfigError(
            "mean squared error compares the outputs of a regression head (got consistency kind 'mse' for another "
            "task); use kind='kl'"
        )
    if logits.dim() == 2:
        return logits
    return losses.token_rows(logits, batch["labels"], shift=shifts_labels(handle))


def count_items(handle: Handle, batch: dict[str, Any]) -> Any:
    """How many rows of the batch carry loss: examples, or target tokens that are not masked (-100)."""
    labels, ids = batch["labels"], batch.get("sample_id")
    if ids is not None and ids.numel() == 1 and int(ids) < 0:
        return 0
    if labels.dim() < 2 or "SequenceClassification" in type(handle.base).__name__:
        return labels.shape[0]
    return (labels[:, 1:] if shifts_labels(handle) else labels).ne(-100).sum()


_NEXT_TOKEN = ("CausalLM", "LMHead", "DoubleHeads", "ConditionalGeneration")
"""Heads that predict the next token, by the names of their classes, and of those that a class of one's own is made of."""


def shifts_labels(handle: Handle) -> bool:
    """Whether the head predicts the next token: labels then stand one position ahead of logits."""
    names = [kind.__name__ for kind in type(handle.base).__mro__]
    return not handle.base.config.is_encoder_decoder and any(part in name for part in _NEXT_TOKEN for name in names)


def _pooled(handle: Handle, batch: dict[str, Any], features: Tensor | None) -> Tensor:
    """Regression compares the pooled last-layer representation: what the head receives, or the token it will take."""
    if features is None:
        raise ConfigError(
            f"the regression head was not found, so there is no representation to compare (got "
            f"{type(handle.base).__name__}); use Consistency(kind='mse')"
        )
    if features.dim() == 2:
        return features
    if handle.stacks[-1].role == "encoder":
        return features[:, 0]
    # As transformers' heads choose: the last token that is not padding, which they know by its id.
    ids, padding = batch.get("input_ids"), handle.base.config.get_text_config().pad_token_id
    if ids is None or padding is None:
        return features[:, -1]
    places = torch.arange(ids.shape[1], device=ids.device) * ids.ne(padding)
    return features[torch.arange(len(features), device=ids.device), places.argmax(dim=1)]


def _per_row(value: Any, batch: dict[str, Any]) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch["labels"].shape[0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model without any dropout, its own included; every module's mode is put back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
