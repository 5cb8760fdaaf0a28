"""What TRL's SFT trainer offers and masks by example cannot follow: refused before anything is made, with the way out."""

from __future__ import annotations

from typing import Any

from ..config import HiddenKeyConfig
from ..errors import ConfigError
from ..loading.planned import check_split
from .sample_ids import SAMPLE_ID

CUTS_DOCUMENTS = ("wrapped", "bfd_split")
"""Packing strategies that put the parts of a document into different rows."""


def check_settings(args: Any, model: Any, peft_config: Any) -> None:
    """A :class:`ConfigError` for settings that would change the loss or the tokens behind the masks' back.

    Args:
        args: TRL's ``SFTConfig``, other ``TrainingArguments``, or ``None``.
        model: a model or the name of one. peft_config: what TRL is to wrap it with, or ``None``.
    """
    if getattr(args, "use_liger_kernel", False):
        raise ConfigError(
            "Liger replaces the layers that are dropped from (got use_liger_kernel=True); set it to False: logits exist "
            "for a few tokens at a time without it"
        )
    loss_type = getattr(args, "loss_type", "nll")
    if loss_type != "nll":
        raise ConfigError(
            f"the task loss is the mean cross-entropy over tokens (got loss_type={loss_type!r}); use loss_type='nll'"
        )
    adapter = peft_config if peft_config is not None else getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ConfigError(
            f"prompt learning puts tokens before every row that belong to no example (got {type(adapter).__name__}); "
            "use an adapter inside the layers, such as LoraConfig"
        )


def check_cuts(args: Any, config: HiddenKeyConfig) -> None:
    """A :class:`ConfigError` for patterns that need whole documents where packing cuts them."""
    strategy = getattr(args, "packing_strategy", None) if getattr(args, "packing", False) else None
    if strategy not in CUTS_DOCUMENTS:
        return
    check_split(config, f"packing_strategy={strategy!r}", "packing_strategy='bfd'")
    part = config.attention
    if strategy == "wrapped" and part is not None and part.pattern == "element" and config.drops_by(part):
        raise ConfigError(
            "packing_strategy='wrapped' lets the documents of a row attend to each other, and pairs of tokens of two "
            "documents have no mask (got attention pattern 'element'); use packing_strategy='bfd', or pattern='column'"
        )


def check_columns(columns: list[str], by_token: bool) -> None:
    """A :class:`ConfigError` for a training set of images, or of rows that somebody packed and nobody numbered.

    ``by_token``: its ``sample_id`` column has one id a token.
    """
    pictures = [name for name in ("image", "images") if name in columns]
    if pictures:
        raise ConfigError(
            f"models that see are not trained this way (got a training set with the column {pictures[0]!r}); use TRL's "
            "SFTTrainer for them"
        )
    if "seq_lengths" in columns and not by_token:
        raise ConfigError(
            "the training set's rows are packed already, and their documents have no numbers (got the column "
            f"'seq_lengths'); let packing=True pack them, or bring a {SAMPLE_ID!r} column with one id a token"
        )


def check_parallelism(parallelism: Any) -> None:
    """A :class:`ConfigError` where rows are spread over devices (``parallelism``: accelerate's, or ``None``)."""
    for name, wanted in (("cp_enabled", "context"), ("sp_enabled", "sequence")):
        if getattr(parallelism, name, False):
            raise ConfigError(
                f"a row's tokens must stay together, as masks count positions in it (got {wanted} parallelism); spread "
                "rows over devices with DDP or FSDP2 instead"
            )
