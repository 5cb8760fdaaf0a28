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
from ..errors import DataError
from .compared import (
    answer_logits,
    answer_loss,
    answers,
    check_kind,
    compared_rows,
    compares_features,
    count_items,
    is_for,
    shifts_labels,
    targets,
)
from .head import Head, head_for, token_losses, without_logits
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


TaskLoss = Callable[[Any, Any], Tensor]


def compute(
    handle: Handle, model: nn.Module, batch: dict[str, Any], num_items: Any, task_loss: TaskLoss | None = None
) -> LossOutput:
    """Both terms of a batch; see :meth:`Handle.compute`."""
    if batch.get("num_items_in_batch") is not None:  # as the stock model takes it, but for both terms
        num_items = batch["num_items_in_batch"] if num_items is None else num_items
        batch = {name: value for name, value in batch.items() if name != "num_items_in_batch"}
    labels = targets(batch)
    if labels is None:
        raise DataError(
            f"the loss needs labels (got a batch with {', '.join(batch) or 'nothing'}); pass labels=... with the batch, or "
            "start_positions and end_positions"
        )
    if batch.get("shift_labels") is not None:
        raise DataError(
            f"the loss is made of labels, and this batch has others that are shifted already (got shift_labels of shape "
            f"{tuple(batch['shift_labels'].shape)}); pass labels alone"
        )
    part = handle.config.consistency
    part = None if part is None or part.weight == 0 else part
    idle = handle.session.require_step().idle
    items = 0 if idle else count_items(handle, batch)
    _check_choices(handle, labels)
    by_token = labels.dim() == 2 and not answers(batch)
    if idle and by_token and not labels.is_floating_point():
        batch = {**batch, "labels": torch.full_like(labels, losses.IGNORED)}
        if handle.base.config.is_encoder_decoder and batch.get("decoder_input_ids") is None:
            batch["decoder_input_ids"] = torch.zeros_like(labels)  # mBART would look for the last token of nothing
    head = head_for(handle, batch)
    if head is not None and task_loss is None and by_token:
        return _on_tokens(handle, head, model, part, batch, num_items)
    carrying = int(items)  # asked before the passes, so that an accelerator's host waits for the labels alone
    passes = _passes(handle, model, part, batch)
    if not carrying:  # a mean over nothing is NaN, and so is its gradient
        zero = 0.0 * (answer_logits(passes.outputs) if answers(batch) else passes.outputs.logits).sum()
        return LossOutput(zero, zero.detach(), None if part is None else zero.detach(), passes.outputs)
    per_row = None
    if part is not None and passes.second is not None:
        per_row = losses.consistency(part.kind, passes.first, passes.second, gradient=part.gradient)
        if labels.dim() == 1 and carrying < len(labels):  # classes that carry no loss are compared no more than tokens
            per_row = per_row[labels.ne(losses.IGNORED)]
    # A mean over this batch's rows (over both branches of a doubled batch: the mean of the two).
    if task_loss is not None:
        task = task_loss(passes.outputs, targets(passes.batch))
    else:
        task = answer_loss(passes.batch, passes.outputs) if answers(batch) else passes.outputs.loss
    if num_items is not None:
        task = task * (items / num_items)
    if per_row is None or part is None:
        return LossOutput(task, task.detach(), None, passes.outputs)
    consistency = losses.reduce(per_row, num_items)
    loss = task + part.weight * consistency.to(task.dtype)
    return LossOutput(loss, task.detach(), consistency.detach(), passes.outputs)


def _check_choices(handle: Handle, labels: Tensor) -> None:
    session = handle.session
    active = session.require_step()
    if session.choices and not active.idle and active.samples.shape != labels.shape[:1]:
        raise DataError(
            f"the batch has another number of examples than there are sample ids (got {len(labels)} examples, sample ids of "
            f"shape {active.samples.shape}); give handle.step one sample id for every example, not for every choice"
        )


def _on_tokens(
    handle: Handle, head: Head, model: nn.Module, part: Consistency | None, batch: dict[str, Any], num_items: Any
) -> LossOutput:
    """Both terms from what the vocabulary head received: logits exist for a few loss-bearing tokens at a time."""
    if part is not None:
        check_kind(handle, part)
    shift = shifts_labels(handle)
    places = losses.labelled_places(batch["labels"], shift=shift)  # before the passes: nobody is to wait for them later

    def rows(batch: dict[str, Any], outputs: Any, received: Any) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        copies = len(labels) // max(len(own), 1)
        where = places if copies == 1 else torch.cat([places + n * own.numel() for n in range(copies)])
        return losses.rows_at(where, received, labels, shift=shift)

    own = batch["labels"]
    passes = _passes(handle, model, part, batch, rows)
    (first, labels), (second, _) = passes.first, passes.second or (None, None)
    both = part is not None and part.gradient == "both"
    # Where no token carries loss both terms are 0, and not 0 / 0.
    items = len(labels) if num_items is None else num_items
    # Written on the device, where it is a number: a copy would make the host wait.
    count = items.to(first.device) if isinstance(items, Tensor) else torch.full((), items, device=first.device)
    scale = 1 / count.clamp(min=1)
    weight = 0.0 if part is None else part.weight
    task_scale = scale / 2 if both else scale
    kind = None if part is None else part.kind
    with gathered(handle.model, head.module) as sharded:
        loss, task, consistency = token_losses(
            head, first, second, labels, kind=kind, both=both, scales=(task_scale, weight * scale)
        )
    if sharded or getattr(model, "static_graph", False):
        # FSDP gathers weights for backward when it reaches what the model returned, here logits of no token; there, too,
        # DDP begins to average where it was told that the graph does not change.
        loss = loss + passes.outputs.logits.sum().to(loss.dtype)
    found = None if second is None else (consistency * scale).detach()
    return LossOutput(loss, (task * task_scale).detach(), found, passes.outputs)


@dataclass(frozen=True, eq=False)
class _Passes:
    """What the passes of a batch gave: the rows to compare (``second``: None if there is one pass), outputs, and of what."""

    first: Any
    second: Any
    outputs: Any
    batch: dict[str, Any]


_ONE_ROW = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Where the documents of a single flat row begin, for FlashAttention: ``position_ids`` say it of any number of rows."""

_Rows = Callable[[dict[str, Any], Any, Any], Any]
_Run = Callable[[dict[str, Any]], tuple[Any, Any]]


def _passes(
    handle: Handle, model: nn.Module, part: Consistency | None, batch: dict[str, Any], rows: _Rows | None = None
) -> _Passes:
    """Run what the consistency term asks for. ``rows`` makes of (batch, outputs, features) what is compared."""
    compiled = handle.compiled_parts.anywhere(model)
    run = partial(_run, handle, model, on_tokens=rows is not None, compiled=compiled)
    # Without gradient a model in training runs as the stock one does; here it is asked for the loss of training.
    force = not torch.is_grad_enabled()

    def gradient_pass(batch: dict[str, Any], branches: tuple[int, ...] = (0,)) -> tuple[Any, Any]:
        with handle.session.branches(branches, force):
            return run(batch)

    if part is None:
        outputs, features = gradient_pass(batch)
        return _Passes(rows(batch, outputs, features) if rows else None, None, outputs, batch)
    compared = rows or (lambda batch, outputs, features: compared_rows(handle, part, batch, outputs, features))
    if part.gradient == "both":
        size = len(batch["labels"] if batch.get("labels") is not None else batch["start_positions"])
        doubled = {
            name: torch.cat([value, value]) if _per_row(value, size) else value
            for name, value in batch.items()
            if name not in _ONE_ROW
        }
        outputs, features = gradient_pass(doubled, (0, 1))
        return _halves(compared(doubled, outputs, features), outputs, doubled)
    shared = handle.sharing.in_graphs(part.kind) if compiled else handle.sharing.layers
    if not shared:
        # The pass without gradient runs first: only its rows are alive while the gradient pass stores activations.
        second = _second_pass(handle, model, part, batch, compared, run)
        if compiled and isinstance(second, Tensor):  # CUDA graphs write the next call's results where these stand
            second = second.clone()
        # An autocast around both keeps its copies of weights; those of a pass without gradient lead no gradient back.
        torch.clear_autocast_cache()
        outputs, features = gradient_pass(batch)
    else:
        with handle.sharing.recording(compiled):
            outputs, features = gradient_pass(batch)
        with handle.sharing.skipping(compiled), _buffers_as_they_are(model):
            second = _second_pass(handle, model, part, _unrouted(handle, batch), compared, run)
    return _Passes(compared(batch, outputs, features), second, outputs, batch)


@contextmanager
def _buffers_as_they_are(model: nn.Module) -> Iterator[None]:
    """DDP writes the first rank's buffers over all others' as a pass begins: not between a pass and its backward."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        yield
        return
    before, model.require_forward_param_sync = model.require_forward_param_sync, False
    try:
        yield
    finally:
        model.require_forward_param_sync = before


def _unrouted(handle: Handle, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch of a pass whose routers' loss nobody reads, and some of whose routers may not run."""
    routed = batch.get("output_router_logits", getattr(handle.base.config, "output_router_logits", False))
    return {**batch, "output_router_logits": False} if routed else batch


def _halves(rows: Any, outputs: Any, batch: dict[str, Any]) -> _Passes:
    """The two branches of a doubled batch."""
    if isinstance(rows, tuple):
        (first, second), (one, two) = (part.chunk(2) for part in rows)
        return _Passes((first, one), (second, two), outputs, batch)
    first, second = rows.chunk(2)
    return _Passes(first, second, outputs, batch)


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
    session.capture, session.features = compares_features(handle), None
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
    given = any(rest.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if handle.base.config.is_encoder_decoder and not given:
        rest["decoder_input_ids"] = handle.base.prepare_decoder_input_ids_from_labels(batch["labels"])
    return rest


def _target_mask(handle: Handle, batch: dict[str, Any]) -> Tensor | None:
    """The targets' real tokens, for an encoder-decoder whose batch brings no decoder mask: up to the last label.

    Where it is to read its inputs once more, behind a start token (classes, answers), as many as those: the last one
    is read only where there is padding behind it, and by no head.
    """
    labels = batch.get("labels")
    if is_for("SequenceClassification", handle.base):  # whose labels are of rows, whatever their shape
        labels = None
    if not handle.base.config.is_encoder_decoder or batch.get("decoder_attention_mask") is not None:
        return None
    if labels is None or labels.dim() != 2:
        real: Tensor | None = batch.get("attention_mask")
        if not isinstance(real, Tensor) or real.dim() != 2 or batch.get("decoder_input_ids") is not None:
            return None
        return real.ne(0)
    return labels.ne(losses.IGNORED).flip(1).cumsum(1).flip(1).ne(0)


def _per_row(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


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
