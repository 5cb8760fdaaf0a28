"""TRL's ``SFTTrainer`` with dropout attached: masks by document, packed or not, and TRL's logs without its extra passes."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..config import HiddenKeyConfig
from ..errors import HiddenKeyError
from .sample_ids import SAMPLE_ID
from .trainer import HiddenKeyTrainerMixin

try:
    from trl import SFTTrainer
    from trl.data_utils import get_dataset_column_names
    from trl.trainer.utils import global_then_local_main_first
except ImportError as error:
    raise HiddenKeyError(
        f"HiddenKeySFTTrainer needs the package trl (got {error}); install hiddenkey_rs with its extra [trl]"
    ) from None

from .sft_checks import check_cuts, check_parallelism, check_settings
from .sft_data import pack_documents, with_ids


class HiddenKeySFTTrainer(HiddenKeyTrainerMixin, SFTTrainer):
    """TRL's supervised fine-tuning with dropout attached.

    Takes the arguments of ``trl.SFTTrainer``, and ``config``, ``stock_dropout`` and ``impl`` as :class:`HiddenKeyTrainerMixin`.

    A document's id is its ``sample_id`` column, else its row in ``train_dataset`` as it was given: before TRL filters,
    shuffles and packs. Its masks are drawn in its own coordinates, so they do not depend on what it is packed with.
    The loss is the mean over the tokens whose labels TRL left in (completions, assistant turns), the consistency term
    sees the same tokens, and logits exist for a few of them at a time. Evaluation and generation are TRL's.

    Logs keep TRL's ``entropy``, ``mean_token_accuracy`` (of the gradient pass, means over the tokens since the last
    log), ``num_tokens`` and ``aux_loss``; no forward pass is added for them.

    Raises:
        ConfigError: settings that masks by example cannot follow: Liger, ``loss_type="dft"``, images, prompt learning,
            context or sequence parallelism, spans in documents that packing cuts, packing without ``max_length``.
        DataError: an iterable data set without a ``sample_id`` column.
        UnsupportedModelError: a model that cannot be attached to.
    """

    _known_losses = (SFTTrainer,)

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *rest: Any,
        config: HiddenKeyConfig | str | None = None,
        stock_dropout: str = "keep",
        **more: Any,
    ) -> None:
        config = HiddenKeyConfig.preset(config) if isinstance(config, str) else config
        check_settings(args, model, more.get("peft_config"))
        check_cuts(args, config or HiddenKeyConfig())
        prepares = not (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
        train_dataset = with_ids(train_dataset, prepares)
        super().__init__(
            model, args, data_collator, train_dataset, *rest, config=config, stock_dropout=stock_dropout, **more
        )
        self._restart_sums()
        if self.handle.head is not None:
            self.handle.head.observer = self._observe
        elif self.aux_loss_enabled:  # the model adds its routers' loss, with a weight that it read before TRL set it
            self.handle.base.router_aux_loss_coef = self.router_aux_loss_coef

    def _check_given(self) -> None:
        super()._check_given()
        check_parallelism(self.accelerator.parallelism_config)

    # -- data -----------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """TRL's preparation; what has ids is packed with them."""
        if not packing or SAMPLE_ID not in get_dataset_column_names(dataset):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy(args)  # packing cuts and shuffles by itself
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        with global_then_local_main_first():
            return pack_documents(dataset, args)

    # -- losses -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Both passes in training, TRL's own loss in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._note_metrics(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    # -- logs -------------------------------------------------------------------------------------------------------

    def _restart_sums(self) -> None:
        device = self.accelerator.device
        self._sums = torch.zeros(2, device=device)
        """Of entropy, over tokens; of the routers' loss, over micro-batches."""
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        """Tokens that carry loss, those predicted right, tokens that the model read, micro-batches."""

    def _observe(self, logits: Tensor, labels: Tensor) -> None:
        """Add the tokens of one piece: logits (n, vocabulary), labels (n,)."""
        # Over the vocabulary only three times, as logits are the largest tensors of a step: H = log sum exp - E[logit].
        highest, best = logits.max(dim=-1)
        chances = logits.softmax(dim=-1)
        total = highest - chances.gather(1, best[:, None])[:, 0].log()
        self._sums[0] += (total - torch.linalg.vecdot(chances, logits)).sum()
        self._counts[0] += len(labels)
        self._counts[1] += (best == labels).sum()

    def _note_metrics(self, inputs: dict[str, Any], outputs: Any) -> None:
        mask, ids = inputs.get("attention_mask"), inputs[SAMPLE_ID]
        read = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        self._counts[2] += read.sum() * (ids >= 0).any()  # not those of a rank that has no row of this step
        self._counts[3] += 1
        logits = outputs.get("logits")
        if logits is not None and logits.shape[1]:  # not made in pieces: a loss of one's own, or routers with one
            labels = inputs["labels"]
            shift = self.handle.shifts_labels
            self._observe(*losses.labelled_rows(logits[: len(labels)].detach().float(), labels, shift=shift))
        if outputs.get("aux_loss") is not None:
            self._sums[1] += outputs["aux_loss"].detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's logs and ours. Ranks meet here, not in every micro-batch."""
        if "loss" in logs:
            entropy, routers = self.accelerator.reduce(self._sums, "sum").tolist()
            tokens, right, read, batches = self.accelerator.reduce(self._counts, "sum").tolist()
            self._restart_sums()
            self._total_train_tokens += read
            found = {"entropy": entropy / max(tokens, 1), "mean_token_accuracy": right / max(tokens, 1)}
            if self.aux_loss_enabled:
                found["aux_loss"] = routers / max(batches, 1)
            found["num_tokens"] = self._total_train_tokens
            self._metrics["train"].update({name: [value] for name, value in found.items()})
        super().log(logs, start_time)


__all__ = ["HiddenKeySFTTrainer"]
