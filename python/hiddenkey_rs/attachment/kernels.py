"""Attention of an attached model through the Triton kernels: no mask of (query, key) pairs exists, anywhere.

The mask function hands down nothing (``Implementation.maskless``); what may attend to what follows from the batch's
documents, which the pass knows, and from the layer: causal or not, and its window. What the kernels cannot compute is an
error where they were asked for by name; ``impl="auto"`` then makes the mask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..config import HiddenKeyConfig
from ..errors import ConfigError
from .passes import Pass, StackPass, check_extent

if TYPE_CHECKING:
    from .sites import Site, SiteDrop


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
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    dropout: float,
    seen: tuple[bool, int | None],
    how: dict[str, Any],
) -> Tensor | None:
    """Attention of one layer, (B, H, Q, D); counts what was dropped.

    ``tensors``: queries, keys, values. ``seen``: what :func:`seen_by` says.

    ``None`` if ``impl="auto"`` has to find another way.

    Raises:
        ConfigError: what Triton cannot compute, or a mask that is not made of the batch's documents.
        DataError: keys that are not the batch's tokens, such as a cache's.
    """
    query, key, value = tensors
    check_extent(stack_pass, site, query.shape[2], key.shape[2])
    causal, width = seen
    reason = ops.triton_attention.obstacle(
        query, key, value, dropout=dropout, bias=how["bias"], softcap=how["softcap"], sinks=how["sinks"]
    )
    if mask is not None and (site.crosses or not _says_the_documents(stack_pass, mask, causal, width)):
        reason = "the attention mask is one of your own, or packs rows whose sample ids do not say so"
    documents = None
    if reason is None:
        try:
            documents = stack_pass.documents(site)
        except ConfigError as error:
            if stack_pass.impl != "auto":
                raise
            reason = str(error)
    if documents is None:
        if stack_pass.impl == "auto":
            return None
        raise ConfigError(f"Triton cannot compute this attention: {reason} (got impl='triton'); use impl='auto'")
    if drop is None and stack_pass.impl == "auto" and width is None and documents.full and not stack_pass.tokens.packed:
        # Whole rows without dropout: nothing is faster than torch's own kernels without a mask.
        group = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=how["scaling"], enable_gqa=group
        )
    settings: dict[str, Any] = {"causal": causal, "window": width, "scaling": how["scaling"]}
    counted = drop is not None and stack_pass.counts(site)
    if drop is not None:
        settings |= {"position": drop.position, "heads": drop.heads, "count": stack_pass.zero() if counted else False}
        heads = key.shape[1] if drop.heads == "group" else query.shape[1]
        if drop.pattern == "element":
            settings |= {"keys": stack_pass.keys(site, depth), "threshold": drop.threshold}
        else:
            settings |= {"keep": stack_pass.columns(site, drop, depth, heads), "rate": drop.realised}
    output, kept = ops.triton_attention.attention(query, key, value, documents, **settings)
    if counted:
        stack_pass.count(site, depth, kept, query.shape[1] * stack_pass.allowed_pairs(site, causal, width))
    return output


def seen_by(site: Site, module: nn.Module, told: Mapping[str, Any]) -> tuple[bool, int | None]:
    """Whether a layer's attention is causal, and how far it sees. ``told``: the keyword arguments of its call."""
    if site.crosses:
        return False, None
    # Decoders may be called, or configured, with is_causal=False: then that comes with the call.
    causal = told.get("is_causal")
    # Layers hand down a window that counts the own key, causal or of both sides (ModernBERT adds it for FlashAttention).
    # Qwen2-MoE keeps its window to itself; a layer without one says so by None.
    window = told.get("sliding_window", getattr(module, "sliding_window", None))
    return bool(getattr(module, "is_causal", False) if causal is None else causal), window


def documents_mask(stack_pass: Pass, site: Site, seen: tuple[bool, int | None]) -> Tensor:
    """The mask of (query, key) pairs that was not made, bool (B, 1, 1 or Q, K): what a layer's tokens may attend to."""
    causal, width = seen
    columns = stack_pass.column_tokens(site)
    if not causal and width is None and not stack_pass.tokens.packed:
        return columns.real[:, None, None]
    return _said(stack_pass, causal, width)[:, None]


def _said(stack_pass: Pass, causal: bool, window: int | None) -> Tensor:
    """Which tokens of a batch's documents see each other, bool (B, L, L)."""
    document, real = stack_pass.tokens.document, stack_pass.tokens.real
    length = document.shape[1]
    said = (document[:, :, None] == document[:, None, :]) & real[:, :, None] & real[:, None, :]
    if window is not None:
        back = ops.sliding_window(length, length, window, device=real.device)[0]
        said &= back if causal else back | back.mT
    elif causal:
        said &= ops.causal(length, length, device=real.device)[0]
    return said


def _says_the_documents(stack_pass: Pass, mask: Tensor, causal: bool, window: int | None) -> bool:
    """Whether a mask allows exactly the pairs of the batch's documents, which the kernels keep to anyway.

    Once one of packed rows did, :func:`.interface.hiddenkey_mask` has no more of them made.
    """
    if not isinstance(stack_pass, StackPass):
        return False
    if any(mask is known for known in stack_pass.agreed):  # layers share it
        return True
    real = stack_pass.tokens.real
    length = real.shape[1]
    if mask.dtype != torch.bool or mask.shape != (len(real), 1, length, length):
        return False
    if not bool(((mask[:, 0] == _said(stack_pass, causal, window)) | ~real[:, :, None]).all()):
        return False
    stack_pass.agreed.append(mask)
    stack_pass.apart = stack_pass.tokens.packed
    return True
