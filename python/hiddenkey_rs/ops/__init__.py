"""Masked attention and hidden-state arithmetic in torch. ``reference`` defines correct, ``api`` chooses."""

from .api import attention
from .generator import column_keep, derive_key, element_keep, philox, span_draw, span_keep
from .hidden import drop_hidden, guided_span
from .reference import attention_weights, causal, kept_set, sliding_window

__all__ = [
    "attention",
    "attention_weights",
    "causal",
    "column_keep",
    "derive_key",
    "drop_hidden",
    "element_keep",
    "guided_span",
    "kept_set",
    "philox",
    "sliding_window",
    "span_draw",
    "span_keep",
]
