"""Masked attention and hidden-state arithmetic in torch. ``reference`` defines correct, ``api`` chooses."""

from .api import attention
from .fused import drop_elements, drop_rows
from .generator import column_keep, derive_key, element_keep, philox, row_keep, span_draw, span_keep
from .hidden import drop_hidden, guided_span
from .reference import attention_weights, causal, kept_set, sliding_window

__all__ = [
    "attention",
    "attention_weights",
    "causal",
    "column_keep",
    "derive_key",
    "drop_elements",
    "drop_hidden",
    "drop_rows",
    "element_keep",
    "guided_span",
    "kept_set",
    "philox",
    "row_keep",
    "sliding_window",
    "span_draw",
    "span_keep",
]
