"""Masked attention and hidden-state arithmetic in torch. ``reference`` defines correct, ``api`` chooses."""

from . import triton_attention, triton_hidden
from .api import IMPLEMENTATIONS, attention, dropped_attention, worth_gathering
from .documents import Documents
from .fused import drop_elements, drop_rows
from .generator import column_keep, derive_key, element_keep, philox, row_keep, span_draw, span_keep
from .hidden import drop_hidden, guided_span
from .pairs import element_pairs, lay_pairs
from .reference import attention_weights, causal, kept_set, repeat_heads, sliding_window

__all__ = [
    "IMPLEMENTATIONS",
    "Documents",
    "attention",
    "attention_weights",
    "causal",
    "column_keep",
    "derive_key",
    "drop_elements",
    "drop_hidden",
    "drop_rows",
    "dropped_attention",
    "element_keep",
    "element_pairs",
    "guided_span",
    "kept_set",
    "lay_pairs",
    "philox",
    "repeat_heads",
    "row_keep",
    "sliding_window",
    "span_draw",
    "span_keep",
    "triton_attention",
    "triton_hidden",
    "worth_gathering",
]
