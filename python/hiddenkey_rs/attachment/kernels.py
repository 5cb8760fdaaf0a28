"""Attention of an attached model through the Triton kernels: no mask of (query, key) pairs exists, anywhere.

The mask function hands down nothing (``Implementation.maskless``); what may attend to what follows from the batch's
documents, which the pass knows, and from the layer: causal or not, and its window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..config import HiddenKeyConfig
from ..errors import ConfigError
from .passes import Pass, StackPass, planned_columns

if TYPE_CHECKING:
    from .sites import Site, SiteDrop
    from .tokens import Tokens


def check_kernels(model: nn.Module, config: HiddenKeyConfig) -> None:
    """A :class:`ConfigError` that says why ``impl="triton"`` cannot run on this model here."""
    parameter = next(model.parameters(), None)
    reason = None if parameter is None else ops.triton_attention.unable(parameter)
    if config.hidden is not None and config.hidden.start == "attention":
        reason = "an attention-guided span needs the attention weights, and they never exist"
    if reason is not None:
        raise ConfigError(
            f"Triton cannot compute this model's attention: {reason} (got impl='triton'); use impl='auto'"
        )


def attend(
    stack_pass: Pass,
    site: Site,
    drop: SiteDrop | None,
    depth: int,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    dropout: float,
    window: int | None,
    how: dict[str, Any],
) -> Tensor:
    """Attention of one layer, (B, H, Q, D); counts what was dropped. ``tensors``: queries, keys, values.

    Raises:
        ConfigError: what Triton cannot compute, or a mask that is not made of the batch's documents.
    """
    query, key, value = tensors
    biases = {name: how[name] for name in ("bias", "softcap", "sinks")}
    reason = ops.triton_attention.obstacle(query, key, value, dropout=dropout, **biases)
    cross = site.kind == "cross-attention"
    causal = not cross and bool(getattr(module, "is_causal", False))
    # Layers hand down a window that counts the own key, causal or of both sides (ModernBERT adds it for FlashAttention).
    width = None if cross else window
    if mask is not None and (cross or not _says_the_documents(stack_pass, mask, causal, width)):
        reason = "the attention mask is one of your own, or packs rows whose sample ids do not say so"
    if not isinstance(stack_pass, StackPass):
        reason = "the model is compiled"
    if reason is not None or not isinstance(stack_pass, StackPass):
        raise ConfigError(f"Triton cannot compute this attention: {reason} (got impl='triton'); use impl='auto'")
    settings: dict[str, Any] = {"causal": causal, "window": width, "scaling": how["scaling"]}
    counted = drop is not None and stack_pass.counts(site)
    if drop is not None:
        settings |= {"position": drop.position, "heads": drop.heads, "count": counted}
        heads = key.shape[1] if drop.heads == "group" else query.shape[1]
        if drop.pattern == "element":
            settings |= {"keys": stack_pass.keys(site, depth), "threshold": drop.threshold}
        else:
            settings |= {"keep": planned_columns(stack_pass, site, drop, depth, heads), "rate": drop.realised}
    documents = stack_pass.documents(site)
    output, kept = ops.triton_attention.attention(query, key, value, documents, **settings)
    if counted:
        pairs = _allowed_pairs(stack_pass.tokens, stack_pass.column_tokens(site), causal, width)
        total = kept.new_full((), query.shape[1] * pairs)  # written there: a copy would make the host wait
        stack_pass.count(site, depth, total - kept, total)
    return output


def _says_the_documents(stack_pass: Pass, mask: Tensor, causal: bool, window: int | None) -> bool:
    """Whether a mask allows exactly the pairs of the batch's documents, which the kernels keep to anyway.

    Once one of packed rows did, :func:`.interface.hiddenkey_mask` has no more of them made.
    """
    if not isinstance(stack_pass, StackPass):
        return False
    if any(mask is known for known in stack_pass.agreed):  # layers share it
        return True
    document, real = stack_pass.tokens.document, stack_pass.tokens.real
    length = document.shape[1]
    if mask.dtype != torch.bool or mask.shape != (len(document), 1, length, length):
        return False
    said = (document[:, :, None] == document[:, None, :]) & real[:, :, None] & real[:, None, :]
    if window is not None:
        back = ops.sliding_window(length, length, window, device=mask.device)[0]
        said &= back if causal else back | back.mT
    elif causal:
        said &= ops.causal(length, length, device=mask.device)[0]
    if not bool(((mask[:, 0] == said) | ~real[:, :, None]).all()):
        return False
    stack_pass.agreed.append(mask)
    stack_pass.apart = stack_pass.tokens.packed
    return True


def _allowed_pairs(rows: Tokens, columns: Tokens, causal: bool, window: int | None) -> int:
    """How many (query, key) pairs of all documents the mask allows, for one head."""
    if rows is not columns:
        return int((rows.lengths * columns.lengths).sum())
    lengths = rows.lengths.astype(np.int64)
    reach = lengths if window is None else np.minimum(lengths, window)
    back = reach * (reach + 1) // 2 + (lengths - reach) * reach  # the own key, and those before it
    return int((back if causal else 2 * back - lengths).sum())
