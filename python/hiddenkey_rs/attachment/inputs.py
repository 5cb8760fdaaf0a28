"""What a stack receives of a batch, and what that says of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .interface import allowed_and_bias
from .passes import StackPass, check_apart
from .sites import Stack


def stack_inputs(stack: Stack, batch: dict[str, Any], beside: bool, by_token: bool) -> dict[str, Any]:
    """What a stack will receive of a batch.

    ``beside``: it stands beside another one, of an encoder-decoder. ``by_token``: labels, if (B, L), are of tokens.
    """
    if not beside or stack.role == "encoder":
        return batch
    ids = batch.get("decoder_input_ids")
    if ids is None and batch.get("decoder_inputs_embeds") is None:
        # The model makes them: from labels of its tokens, or, under a classification head, from its inputs.
        labels = batch.get("labels")
        ids = labels if labels is not None and labels.dim() == 2 and by_token else batch.get("input_ids")
    memory = batch.get("input_ids") if batch.get("input_ids") is not None else batch.get("inputs_embeds")
    return {
        "input_ids": ids,
        "inputs_embeds": batch.get("decoder_inputs_embeds"),
        "attention_mask": batch.get("decoder_attention_mask"),
        "encoder_hidden_states": memory,  # only its batch and length are looked at
        "encoder_attention_mask": batch.get("attention_mask"),
    }


def real_tokens(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Which tokens are no padding, (B, L) bool. Without a 2-D mask every token counts as real: ``None``."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:  # some models take a mapping of 4-D masks
        return None
    if mask.shape != tokens.shape[:2]:
        raise DataError(
            f"the attention mask covers other tokens than the batch (got {tuple(mask.shape)} for "
            f"{tuple(tokens.shape[:2])}); train without a cache, one mask entry a token"
        )
    return mask.to(torch.bool)


def check_told_apart(stack: Stack, stack_pass: StackPass, batch: Mapping[str, Any]) -> None:
    """A :class:`DataError` unless the batch itself shows that packed documents do not attend to each other.

    A graph cannot look at the mask that reaches attention, as an eager pass does (:func:`.passes.check_apart`).
    """
    config: Any = stack.module.config
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        check_apart(stack_pass, stack.sites[0], allowed_and_bias(mask, None)[0])
        return
    cached = batch.get("use_cache", getattr(config, "use_cache", False))
    if not stack.spec.tells_documents or batch.get("position_ids") is None or cached:
        raise DataError(
            f"a compiled model cannot show that the documents of packed rows do not attend to each other (got "
            f"{config.model_type!r}, position_ids {'missing' if batch.get('position_ids') is None else 'given'}, use_cache="
            f"{bool(cached)}); give a decoder position_ids that restart and use_cache=False, or a mask of (batch, 1, length, "
            "length)"
        )


def lets_documents_mix(stack: Stack, mask: Tensor | None) -> bool:
    """A decoder that is given a 2-D mask beside packed rows is asked to (TRL's wrapped packing)."""
    return stack.role == "decoder" and isinstance(mask, Tensor) and mask.dim() == 2
