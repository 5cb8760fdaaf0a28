"""``transformers.Trainer`` with dropout attached: both passes, exact accumulation, logs, the side-car, exact resume."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import has_length

from ..attachment import Handle, attach
from ..attachment.compared import targets
from ..attachment.handle import attached_session
from ..config import HiddenKeyConfig
from ..errors import ConfigError
from ..loading.collator import PLAN
from ..loading.planned import check_split
from . import ranks
from .fingerprint import data_parts, run_parts
from .loader import Loader, check_loader, order_of, stream_of, streaming
from .resume import check_data, check_place, checked_checkpoint, save_data, warn_about_generators
from .sample_ids import SAMPLE_ID, SAMPLE_POSITION, WithSampleIds, is_hub_data, with_sample_ids
from .stores import StoreCollator, check_stores, is_store
from .stream import Stream

_RATE = "realised_rate_"

if TYPE_CHECKING:  # the mixin is read as what it stands in front of; it has no base, so that it fits every Trainer
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class HiddenKeyTrainerMixin(_Trainer):
    """Put in front of a ``transformers.Trainer`` class that leaves ``compute_loss`` to it, such as ``Seq2SeqTrainer``.

    Takes the Trainer's arguments and:
        config: what to drop (default: HiddenKey), a :class:`~hiddenkey_rs.HiddenKeyConfig` or a preset's name.
        stock_dropout: ``"keep"`` or ``"off"``, and impl: who computes attention, as :func:`~hiddenkey_rs.attach`.
        loader: who makes training batches. ``"hiddenkey"``, or a :class:`Loader` with its choices: a
            :class:`~hiddenkey_rs.BatchSampler`, whose global batches depend on neither ranks nor micro-batches, and from
            which a run is resumed on any number of them. ``"stock"``: the Trainer. ``"auto"``: ours for a
            :class:`~hiddenkey_rs.TokenStore`, else the Trainer's.

    An example's id is its ``sample_id`` column, else its row in ``train_dataset``; an iterable data set must bring the
    column. Loss and consistency are means over the whole global batch of an optimiser step, so that splitting it into
    micro-batches changes nothing but rounding. Logs gain ``task_loss``, ``consistency_loss`` and
    ``realised_rate_<site>``. Evaluation is the stock model's. ``handle`` is the :class:`~hiddenkey_rs.Handle`.

    A loss of one's own is ``compute_loss_func``: it is called with ``(outputs, labels, num_items_in_batch=None)`` for every
    micro-batch and returns a mean over what carries loss, which is weighted by its share of the global batch.

    On several ranks all of this is over all of them, whatever ``average_tokens_across_devices`` says. Before the first
    step they compare what they hold.

    Raises:
        ConfigError: arguments at odds with each other, with the launcher or with accelerate; a class behind the mixin that
            computes a loss of its own.
        DataError: examples without ids, ids beyond the vocabulary, a part of a token store.
        UnsupportedModelError: a model that cannot be attached to.
        StateError: from ``train(resume_from_checkpoint=...)``, where going on would train something else.

    Example:
        >>> import tempfile, transformers
        >>> shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        >>> bert = transformers.BertConfig(vocab_size=50, **shape)
        >>> with tempfile.TemporaryDirectory() as out:
        ...     settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        ...     trainer = HiddenKeyTrainer(
        ...         model=transformers.BertForSequenceClassification(bert),
        ...         args=transformers.TrainingArguments(out, max_steps=1, logging_strategy="no", **settings),
        ...         train_dataset=[{"input_ids": [5, n, 7], "labels": n % 2} for n in range(8)],
        ...         config="hiddenkey",
        ...         stock_dropout="off",
        ...     )
        ...     steps = trainer.train().global_step  # doctest: +ELLIPSIS
        {...}
        >>> steps
        1
    """

    handle: Handle
    train_dataset: Any
    _known_losses: tuple[type, ...] = ()
    """Classes behind this one whose ``compute_loss`` a subclass stands in for."""

    def __init__(
        self,
        *args: Any,
        config: HiddenKeyConfig | str | None = None,
        stock_dropout: str = "keep",
        impl: str = "auto",
        loader: Loader | str = "auto",
        **kwargs: Any,
    ) -> None:
        self._check_loss()
        self._hiddenkey = (config, stock_dropout, impl)
        names = ("model", "args", "data_collator", "train_dataset", "eval_dataset")  # the Trainer's, in its order
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        check_stores(given.get("data_collator"), given.get("train_dataset"), given.get("eval_dataset"))
        model = given.get("model")
        earlier = None if isinstance(model, str | None) else _released(model)
        try:
            # What cannot be attached to is refused before the Trainer makes folders.
            if not isinstance(model, str | None):
                attach(model, config, stock_dropout, impl).detach()
            super().__init__(*args, **kwargs)
            self._loader = Loader.of(loader, is_store(self.train_dataset))
            self._check_given()
            self.train_dataset = with_sample_ids(self.train_dataset)
            self.data_collator = StoreCollator.around(self)
            # Not earlier, as some trainers wrap their model or change its config.
            self.handle = self._attach(self.model)
        except BaseException:
            if earlier is not None:
                earlier.put_back()
            raise
        # Our losses are normalised over the whole accumulated batch: the Trainer must not divide them again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._begin = 0
        self._window: dict[str, Any] = {"step": 0}
        self._stream: Stream | None = None
        self._checkpoint: str | None = None

    @classmethod
    def _check_loss(cls) -> None:
        """Raise for a class behind this one whose loss would be left to evaluation, as training needs both passes'."""
        for behind in cls.__mro__[cls.__mro__.index(HiddenKeyTrainerMixin) + 1 :]:
            if behind is transformers.Trainer:
                return
            if "compute_loss" in vars(behind) and behind not in cls._known_losses:
                raise ConfigError(
                    f"training would not use the loss of {behind.__name__} (got {cls.__name__}, where its compute_loss stands "
                    "behind the mixin); give that loss as compute_loss_func=, which is called with outputs, labels and "
                    "num_items_in_batch=None"
                )

    def _check_given(self) -> None:
        """Raise for what this Trainer was given and cannot follow, before anything is attached."""
        check_loader(self, self._loader)
        if getattr(self.train_dataset, "too_long", None) == "split":
            check_split(self._hiddenkey[0])

    def call_model_init(self, trial: Any = None) -> Any:
        """A fresh model (hyperparameter search): what was attached to the last one moves over."""
        if hasattr(self, "handle"):  # first: the new model may be made from a config of the old one
            self.handle.detach()
        model = super().call_model_init(trial)
        if hasattr(self, "handle"):
            self.handle = self._attach(model)
        return model

    def _attach(self, model: Any) -> Handle:
        handle = attach(model, *self._hiddenkey)
        handle.session.of_trainer = True
        return handle

    # -- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The Trainer's loader, with sample ids carried around its collator, and its batches or ours."""
        with self._carrying_ids(), self._without_unused():
            loader = super().get_train_dataloader()
        with ranks.together():
            if self._loader is not None:
                self._stream = stream_of(self, self._loader)
                if self._checkpoint is not None:
                    self._stream.load(self._checkpoint)
                loader = streaming(loader, self._stream)
        self._compare_ranks(loader)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's loader. Rows of one id a token, which no other collator pads, are for evaluation, too."""
        with self._carrying_ids(False, eval_dataset):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As :meth:`get_eval_dataloader`."""
        with self._carrying_ids(False, test_dataset):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _carrying_ids(self, required: bool = True, later: Any = None) -> Iterator[None]:
        collator = self.data_collator
        self.data_collator = StoreCollator.with_ids(StoreCollator.around(self, later), required)
        try:
            yield
        finally:
            self.data_collator = collator

    @contextmanager
    def _without_unused(self) -> Iterator[None]:
        """Columns that the model does not take leave before they are read, as where the Trainer sees the data set."""
        data = self.train_dataset
        # A transform of one's own reads other columns than it gives: what it gives is looked through by the collator.
        if isinstance(data, WithSampleIds) and is_hub_data(data.dataset) and data.dataset.format["type"] != "custom":
            self.train_dataset = WithSampleIds(self._remove_unused_columns(data.dataset, description="training"))
        try:
            yield
        finally:
            self.train_dataset = data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's, of the data set that it was given: it asks that one for lengths."""
        data = self.train_dataset if train_dataset is None else train_dataset
        if self._loader is not None:  # ours comes in its place, and reading all lengths takes long
            return SequentialSampler(data)
        return super()._get_train_sampler(data.dataset if isinstance(data, WithSampleIds) else data)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if isinstance(data_collator, StoreCollator):  # a store holds nothing that a batch does not
            examples = super()._get_collator_with_removed_columns(data_collator.examples, description)
            return StoreCollator(data_collator.rows, examples)
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _compare_ranks(self, loader: Any) -> None:
        """Before anything is shared: every rank trains the same, on the same data, for as many steps."""
        if ranks.world_size() > 1:
            config, (_, stock_dropout, _) = self.handle.config, self._hiddenkey
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            late = getattr(plugin, "cpu_ram_efficient_loading", False)  # then the first rank alone has read its weights
            ranks.check_same(
                {
                    **run_parts(config, stock_dropout, self.args, None if late else self.model),
                    **data_parts(self.train_dataset),
                    "number of micro-batches": str(len(loader)) if has_length(loader) else "unknown",
                    "checkpoint": os.path.basename(self._checkpoint or "none"),
                    "loader": str(self._loader),
                }
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SAMPLE_ID not in self._signature_columns:
            self._signature_columns.extend((SAMPLE_ID, SAMPLE_POSITION))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step, and how many rows of all of them carry loss (on every rank)."""
        if (
            self.state.global_step >= self.state.max_steps
        ):  # resumed at its end, where the Trainer would do one step more
            self.control.should_training_stop = True
            return [], None
        # Not the Trainer's own way: it asks the other ranks only where there is a batch, so one without would hang.
        batches = list(islice(epoch_iterator, num_batches))
        counts = [self.handle.count_items(batch) for batch in batches if targets(batch) is not None]
        total = torch.as_tensor(sum(counts), device=device)
        if self._scale() > 1:
            mine = torch.stack([total, torch.full_like(total, len(batches))])
            every = self.accelerator.gather(mine[None])
            ranks.check_even(every[:, 1].tolist(), self.state.global_step)
            return batches, every[:, 0].sum()
        return batches, total if counts else None

    def _scale(self) -> int:
        """By how much the averaging of gradients over ranks shrinks a loss that is a sum over all of them."""
        return int(self.accelerator.num_processes)

    # -- losses -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Both passes in training, the Trainer's own loss in evaluation."""
        inputs = dict(inputs)
        sample_ids, positions = inputs.pop(SAMPLE_ID, None), inputs.pop(SAMPLE_POSITION, None)
        inputs.pop(PLAN, None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._without_cache(inputs, sample_ids)
        with self.handle.step(self.state.global_step, sample_ids, positions):
            result = self.handle.compute(
                inputs, num_items_in_batch, model=model, task_loss=self._task_loss("labels" in inputs)
            )
        self._note("task_loss", result.task)
        if result.consistency is not None:
            self._note("consistency_loss", result.consistency)
        loss = result.loss * self._scale()
        return (loss, result.outputs) if return_outputs else loss

    def _task_loss(self, labelled: bool) -> Any:
        """The user's own loss or label smoothing, as a function of (outputs, labels); ``None`` = the model's loss."""
        custom = self.compute_loss_func
        if custom is not None:  # as the Trainer calls it where targets have other names
            return lambda outputs, labels: custom(outputs, labels if labelled else None, num_items_in_batch=None)
        smoother = self.label_smoother
        if smoother is not None and labelled:
            return lambda outputs, labels: smoother(outputs, labels, shift_labels=self.handle.shifts_labels)
        return None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluation never needs sample ids; a column of them must not reach the model."""
        sample_ids = inputs.get(SAMPLE_ID)
        inputs = {name: value for name, value in inputs.items() if name not in (SAMPLE_ID, SAMPLE_POSITION, PLAN)}
        self._without_cache(inputs, sample_ids)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _without_cache(self, inputs: dict[str, Any], sample_ids: Tensor | None) -> None:
        """With a cache, which ``TrainingArguments`` may switch on, transformers lets packed examples see each other."""
        if sample_ids is not None and sample_ids.dim() == 2 and self.handle.stacks[-1].role == "decoder":
            inputs["use_cache"] = False

    # -- logs -------------------------------------------------------------------------------------------------------

    def _note(self, name: str, value: Tensor) -> None:
        self._window[name] = self._window.get(name, 0.0) + value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's logs, with both terms (means over the steps since the last log) and the measured rates."""
        steps = self.state.global_step - self._window["step"]
        if "loss" in logs and steps > 0:
            terms, counts = ranks.summed(self._terms()), ranks.summed(self.handle.counted())
            rates = {f"{_RATE}{site}": dropped / of for site, (dropped, of) in counts.items() if of}
            logs = {**logs, **{name: total / steps for name, (total,) in terms.items()}, **rates}
            self._window = {"step": self.state.global_step}
            self.handle.reset_counts()
        super().log(logs, *args, **kwargs)

    def _terms(self) -> dict[str, tuple[float, ...]]:
        return {name: (float(total),) for name, total in self._window.items() if name != "step"}

    # -- state ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's save, and ``hiddenkey_config.json`` beside the adapter."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.handle.config.save_pretrained(folder)
            if _internal_call:
                save_data(folder, self._data)
            if _internal_call and self._stream is not None:
                self._stream.save(folder)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's train. Resuming needs a whole checkpoint of the same config, else a :class:`StateError`."""
        with ranks.together():
            self._begin = 0
            self.__dict__.pop("_data", None)
            self._checkpoint = self._resumed(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(self._checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop; it begins anew with a smaller batch where memory ran out (``auto_find_batch_size``)."""
        self._window = {"step": self._begin}
        self.handle.reset_counts()
        return super()._inner_training_loop(*args, **kwargs)

    @cached_property
    def _data(self) -> dict[str, str]:
        """The rows, and what fixes the stock loader's order: seed, rows a step. Worked out once a training."""
        arguments: Any = self.args
        found = {} if self.train_dataset is None else dict(data_parts(self.train_dataset))
        if self._loader is not None:  # whose own state has the rest
            return found
        found["train_sampling_strategy"] = order_of(arguments)
        found["order's seed"] = str(arguments.seed if arguments.data_seed is None else arguments.data_seed)
        if not arguments.auto_find_batch_size:
            found["number of rows a step"] = str(
                arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
            )
        return found

    def _resumed(self, checkpoint: str | bool) -> str:
        folder = self.args.output_dir
        found = checked_checkpoint(checkpoint, folder, self.handle.config, streamed=self._loader is not None)
        check_data(found, self._data)
        own_dropout = bool(self.handle.stock.live) or self.handle.adapter_dropout
        warn_about_generators(found, self._scale(), own_dropout)
        state = transformers.TrainerState.load_from_json(os.path.join(found, "trainer_state.json"))
        drawn = _drawn_globally(self.args)
        if drawn and self._loader is None and has_length(self.train_dataset) and not self.args.ignore_data_skip:
            check_place(found, float(state.epoch or 0), drawn)
        self._begin = state.global_step
        return found


class HiddenKeyTrainer(HiddenKeyTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with dropout attached; see :class:`HiddenKeyTrainerMixin`."""


def _drawn_globally(arguments: Any) -> str | None:
    """What of the stock loader's order torch's global generator draws, if anything."""
    order = order_of(arguments)
    if order == "group_by_length":
        return "grouped by length"
    seeded = arguments.accelerator_config.use_seedable_sampler
    return "drawn without use_seedable_sampler" if order == "random" and not seeded else None


def logged_rates(logs: Mapping[str, Any]) -> dict[str, float]:
    """Measured rate by site, of logs that have any."""
    return {name.removeprefix(_RATE): value for name, value in logs.items() if name.startswith(_RATE)}


def _released(model: Any) -> Handle | None:
    """Free a model that an earlier Trainer left attached, as training in stages is ordinary; its handle, if that lives."""
    session = attached_session(model)
    if session is None or not session.of_trainer:
        return None
    session.undo()
    handle: Handle | None = session.handle()
    return handle
