"""The attention function and the mask function that transformers calls while a model is attached.

Both are registered once under the name ``hiddenkey``; which model, which layer and which pass they serve comes with
the call. Outside an active training pass they are the functions that the model had before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from ..errors import DataError, StateError, UnsupportedModelError
from .kernels import attend, documents_mask, seen_by
from .passes import Pass, StackPass, attention_keep, check_apart
from .prepared import PreparedPass
from .sites import Site

if TYPE_CHECKING:
    from .implementation import Implementation

NAME = "hiddenkey"
PASS_KEYWORD = "hiddenkey"
DEPTH_KEYWORD = "hiddenkey_depth"
FORBIDDEN = -5e3
"""What an additive mask says at most of a pair that it forbids: older models write -1e4, in bfloat16 -9984."""

MASKLESS_GRAPHS = UNPACKED_GRAPHS = False
"""Whether the attention of the compiled model that is being called knows by itself what may attend to what; whether that
model was given no positions, which might say that rows are packed."""
IMPLEMENTATIONS: WeakValueDictionary[int, Implementation] = WeakValueDictionary()
"""``id(config)`` of an attached (sub)model -> what it computed attention with before. Lives as long as the hooks."""


def register() -> None:
    """Make the name ``hiddenkey`` known to transformers (again: harmless)."""
    AttentionInterface.register(NAME, hiddenkey_attention)
    AttentionMaskInterface.register(NAME, hiddenkey_mask)


@contextmanager
def maskless_graphs(maskless: bool, unpacked: bool) -> Iterator[None]:
    """A call of a compiled model: no mask of pairs is made in its graph, where that says no more than documents do."""
    global MASKLESS_GRAPHS, UNPACKED_GRAPHS
    before = MASKLESS_GRAPHS, UNPACKED_GRAPHS
    MASKLESS_GRAPHS, UNPACKED_GRAPHS = maskless, unpacked
    try:
        yield
    finally:
        MASKLESS_GRAPHS, UNPACKED_GRAPHS = before


def hiddenkey_mask(*args: Any, **kwargs: Any) -> Any:
    """Mask function: a full boolean mask while a pass is active, else what the model made before."""
    # A compiled graph cannot look anything up by identity, and never asks outside an active pass: see Session.open.
    compiling = torch.compiler.is_compiling()
    implementation = None if compiling else IMPLEMENTATIONS.get(id(kwargs.get("config")))
    if implementation is not None and not implementation.active:
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation.original](*args, **kwargs)
    if compiling:
        maskless, told = MASKLESS_GRAPHS, UNPACKED_GRAPHS
    else:
        maskless = implementation is not None and implementation.maskless
        told = implementation is not None and implementation.packed
    # transformers asks for vmap where a function of the caller's own had a part in the mask.
    if maskless and ((told and kwargs.get("use_vmap") is False) or _plain(**kwargs)):
        return None
    padding = _padding_mask(**kwargs)
    if padding is not None:
        return padding
    # A skipped mask (None) would leave causality to a flag that boolean keep masks cannot be combined with.
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **kwargs)


def _plain(*, mask_function: Any = None, local_size: int | None = None, **rest: Any) -> bool:
    """Whether a mask says no more than causality, a window and padding."""
    if local_size is None:
        return mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    # A window's function is made anew each time. Of packed rows or a mask of one's own, transformers lets no causal one go.
    return "allow_is_bidirectional_skip" in rest or bool(rest.get("allow_is_causal_skip", True))


def _padding_mask(
    *,
    batch_size: int = 0,
    kv_length: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: Any = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask of an encoder without windows: all queries see the same keys, so one row (B, 1, 1, K) says it all."""
    if mask_function is not bidirectional_mask_function or local_size is not None:
        return None
    if attention_mask is None:
        return torch.ones(batch_size, 1, 1, kv_length, dtype=torch.bool, device=device)
    return attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)[:, None, None]


def hiddenkey_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer. query (B, H, Q, D); key, value (B, Hkv, K, D) -> (B, Q, H, D) and no weights."""
    stack_pass: Pass | None = kwargs.pop(PASS_KEYWORD, None)
    call = kwargs.pop(DEPTH_KEYWORD, None)
    site = stack_pass.sites.get(module) if stack_pass is not None else None
    if stack_pass is None:
        _check_outside(module)
    if stack_pass is None or site is None:
        extra = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
        given = {name: value for name, value in extra.items() if value is not None}
        stock = _stock_attention(module)
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given, **kwargs)
    layer = site.layer
    depth = layer.index if call is None else call * site.stack.inner + layer.index  # type: ignore[union-attr]
    in_graph = isinstance(stack_pass, PreparedPass) and torch.compiler.is_compiling()
    if not in_graph:
        layer.current = stack_pass
    if not in_graph or call is not None:  # a graph may not change anything inside a checkpointed layer
        layer.depth = depth
    if query.dtype != value.dtype and torch.is_autocast_enabled(value.device.type):
        # Rotary tables in float32 make queries and keys wider than values; torch's own attention casts them back.
        query, key = query.to(value.dtype), key.to(value.dtype)
    allowed, bias = allowed_and_bias(attention_mask, position_bias)
    by_kernels = stack_pass.kernels and attention_mask is None  # which keep documents apart by themselves
    if stack_pass.suspect and not by_kernels:
        check_apart(stack_pass, site, allowed)
    stack_pass.visit(site)
    how: dict[str, Any] = {"scaling": scaling, "bias": bias, "softcap": softcap, "sinks": s_aux}
    drop = site.drops.get(depth) if module.training else None  # part of a model may be out of training
    seen = seen_by(site, module, kwargs)
    if stack_pass.kernels:
        output = attend(stack_pass, site, drop, depth, (query, key, value), attention_mask, dropout, seen, how)
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    # No mask may be one that the kernels would have made needless, or a caller's own, which leaves causality to the layer.
    if attention_mask is None and (stack_pass.kernels or seen != (False, None)):
        allowed = documents_mask(stack_pass, site, seen)
    if drop is None:
        _note_received(site, query, key, allowed, None, **how)
        impl = stack_pass.impl if stack_pass.impl in ("reference", "sdpa") else "auto"  # the others need a drawn mask
        output = ops.attention(query, key, value, allowed=allowed, kept=allowed, dropout=dropout, impl=impl, **how)
        return output.transpose(1, 2).contiguous(), None
    heads = key.shape[1] if drop.heads == "group" else query.shape[1]
    keep = attention_keep(stack_pass, site, drop, depth, heads, query.shape[2], key.shape[2])
    _note_received(site, query, key, allowed, keep, **how)
    rescue = "all" if site.crosses else "own"
    by_row = allowed is None or allowed.shape[1:3] == (1, 1)  # all queries of a document see the same keys
    if by_row and isinstance(stack_pass, StackPass) and stack_pass.keeps_some(site, drop, depth):
        rescue = "none"  # known from the plan: masks of one row stay so, and no device is asked
    output, dropped, total = ops.dropped_attention(
        query,
        key,
        value,
        allowed=allowed,
        keep=keep,
        rescue=rescue,
        rate=drop.realised,
        position=drop.position,
        dropout=dropout,
        impl=stack_pass.impl,
        **how,
    )
    stack_pass.count(site, depth, total - dropped, total)
    return output.transpose(1, 2).contiguous(), None


def allowed_and_bias(attention_mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask into the boolean set of allowed pairs and the finite numbers to add to their logits."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask, bias
    if not attention_mask.is_floating_point():
        raise DataError(
            f"a mask of pairs is bool (True = may attend) or added to logits (got {attention_mask.dtype}); give mask.bool()"
        )
    # A user's own 4-D additive mask: what no softmax gives any weight is forbidden, anything else is a bias. A pair that is
    # forbidden by -1e4 must stay so where all others of its row are dropped.
    allowed = attention_mask > FORBIDDEN
    numbers = attention_mask.masked_fill(~allowed, 0.0)
    return allowed, numbers if bias is None else bias + numbers


def _note_received(
    site: Site, query: Tensor, key: Tensor, allowed: Tensor | None, keep: Tensor | None, **how: Any
) -> None:
    """Leave the attention that each key received where an attention-guided HiddenCut span will look for it."""
    if site.kind != "attention" or not site.layer.guided:
        return
    with torch.no_grad():
        kept = allowed
        if keep is not None:
            keep = ops.repeat_heads(keep, query.shape[1])
            kept = ops.kept_set(allowed, keep, rescue="own", queries=query.shape[2], keys=key.shape[2])
        weights = ops.attention_weights(query, key, allowed=allowed, kept=kept, **how)
        site.layer.received = weights.sum(dim=(1, 2), dtype=torch.float32)


def _check_outside(module: nn.Module) -> None:
    """An :class:`UnsupportedModelError` if attention runs inside an active pass that did not reach it, or that nobody began.

    The mask that it was given is one of ours, which not every stock function reads as we do.
    """
    implementation = None if torch.compiler.is_compiling() else IMPLEMENTATIONS.get(id(getattr(module, "config", None)))
    if implementation is not None and implementation.active:
        raise UnsupportedModelError(
            f"the model hands no keyword arguments to this attention, so its dropout cannot reach it (got "
            f"{type(module).__name__}); use a model class of which every attention layer receives them"
        )
    session = None if implementation is None else implementation.session()
    if session is not None:
        session.check_outside(module)


def _stock_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    implementation = IMPLEMENTATIONS.get(id(getattr(module, "config", None)))
    if implementation is None:
        raise StateError(
            f"the attention implementation {NAME!r} was called by a model that nothing is attached to (got "
            f'{type(module).__name__}); if it is a copy, call its set_attn_implementation("sdpa") first'
        )
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation.original, eager)
