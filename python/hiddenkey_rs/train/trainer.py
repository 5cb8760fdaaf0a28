"""``transformers.Trainer`` with dropout attached: both passes, exact accumulation, logs, the side-car, exact resume."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..attachment import Handle, attach
from ..config import HiddenKeyConfig
from .resume import checked_checkpoint
from .sample_ids import SAMPLE_ID, SampleIdCollator, with_sample_ids


class HiddenKeyTrainerMixin:
    """Put in front of any ``transformers.Trainer`` class.

    Takes the Trainer's arguments and:
        config: what to drop (default: HiddenKey), a :class:`~hiddenkey_rs.HiddenKeyConfig` or a preset's name.
        stock_dropout: ``"keep"`` or ``"off"``, as :func:`~hiddenkey_rs.attach`.

    An example's id is its ``sample_id`` column, else its row in ``train_dataset``; an iterable data set must bring the
    column. Loss and consistency are means over the whole global batch of an optimiser step, so that splitting it into
    micro-batches changes nothing but rounding. Logs gain ``task_loss``, ``consistency_loss`` and
    ``realised_rate_<site>``. Evaluation is the stock model's. ``handle`` is the :class:`~hiddenkey_rs.Handle`.
    """

    handle: Handle

    def __init__(
        self, *args: Any, config: HiddenKeyConfig | str | None = None, stock_dropout: str = "keep", **kwargs: Any
    ) -> None:
        self._hiddenkey = (config, stock_dropout)
        model = kwargs.get("model", args[0] if args else None)
        if model is not None:  # what cannot be attached to is refused before the Trainer makes folders
            self.handle = attach(model, config, stock_dropout)
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            if hasattr(self, "handle"):
                self.handle.detach()
            raise
        if not hasattr(self, "handle"):
            self.handle = attach(self.model, config, stock_dropout)  # type: ignore[attr-defined]
        self.train_dataset = with_sample_ids(self.train_dataset)  # type: ignore[has-type]
        # Our losses are normalised over the whole accumulated batch: the Trainer must not divide them again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._window: dict[str, Any] = {"step": 0}

    def call_model_init(self, trial: Any = None) -> Any:
        """A fresh model (hyperparameter search): what was attached to the last one moves over."""
        model = super().call_model_init(trial)  # type: ignore[misc]
        if hasattr(self, "handle"):
            self.handle.detach()
            self.handle = attach(model, *self._hiddenkey)
        return model

    # -- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The Trainer's loader, with sample ids carried around its collator."""
        collator = self.data_collator  # type: ignore[has-type]
        self.data_collator = SampleIdCollator(collator)
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if SAMPLE_ID not in self._signature_columns:  # type: ignore[attr-defined]
            self._signature_columns.append(SAMPLE_ID)  # type: ignore[attr-defined]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step, and how many rows of all of them carry loss (on every rank)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        counts = [self.handle.count_items(batch) for batch in batches if batch.get("labels") is not None]
        if not counts:
            return batches, None
        total = torch.as_tensor(sum(counts), device=device)
        if self._scale() > 1:
            total = self.accelerator.gather(total.reshape(1)).sum()  # type: ignore[attr-defined]
        return batches, total

    def _scale(self) -> int:
        """By how much DDP's averaging shrinks a loss that is a sum over all ranks."""
        averages = self.args.average_tokens_across_devices  # type: ignore[attr-defined]
        return int(self.accelerator.num_processes) if averages else 1  # type: ignore[attr-defined]

    # -- losses -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Both passes in training, the Trainer's own loss in evaluation."""
        inputs = dict(inputs)
        sample_ids = inputs.pop(SAMPLE_ID, None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        with self.handle.step(self.state.global_step, sample_ids):  # type: ignore[attr-defined]
            result = self.handle.compute(inputs, num_items_in_batch, model=model, task_loss=self._task_loss())
        self._note("task_loss", result.task)
        if result.consistency is not None:
            self._note("consistency_loss", result.consistency)
        loss = result.loss * self._scale()
        return (loss, result.outputs) if return_outputs else loss

    def _task_loss(self) -> Any:
        """The user's own loss or label smoothing, as a function of (outputs, labels); ``None`` = the model's loss."""
        custom = self.compute_loss_func  # type: ignore[attr-defined]
        if custom is not None:
            return lambda outputs, labels: custom(outputs, labels, num_items_in_batch=None)
        smoother = self.label_smoother  # type: ignore[attr-defined]
        if smoother is not None:
            return lambda outputs, labels: smoother(outputs, labels, shift_labels=self.handle.shifts_labels)
        return None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluation never needs sample ids; a column of them must not reach the model."""
        inputs = {name: value for name, value in inputs.items() if name != SAMPLE_ID}
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    # -- logs -------------------------------------------------------------------------------------------------------

    def _note(self, name: str, value: Tensor) -> None:
        self._window[name] = self._window.get(name, 0.0) + value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's logs, with both terms (means over the steps since the last log) and the measured rates."""
        steps = self.state.global_step - self._window["step"]  # type: ignore[attr-defined]
        if "loss" in logs and steps > 0:
            terms = {name: float(total) / steps for name, total in self._window.items() if name != "step"}
            rates = {f"realised_rate_{site}": rate for site, rate in self.handle.realised().items()}
            logs = {**logs, **terms, **rates}
            self._window = {"step": self.state.global_step}  # type: ignore[attr-defined]
            self.handle.reset_counts()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # -- state ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's save, and ``hiddenkey_config.json`` beside the adapter."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self.args.should_save:  # type: ignore[attr-defined]
            self.handle.config.save_pretrained(output_dir or self.args.output_dir)  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's train. Resuming needs a whole checkpoint of the same config, else a :class:`StateError`."""
        if resume_from_checkpoint:
            folder = self.args.output_dir  # type: ignore[attr-defined]
            resume_from_checkpoint = checked_checkpoint(resume_from_checkpoint, folder, self.handle.config)
            self._window["step"] = int(os.path.basename(resume_from_checkpoint).rpartition("-")[2] or 0)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]


class HiddenKeyTrainer(HiddenKeyTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with dropout attached; see :class:`HiddenKeyTrainerMixin`."""
