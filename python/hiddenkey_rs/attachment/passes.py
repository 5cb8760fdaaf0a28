"""One forward pass through one stack, and the masks that its sites draw for it.

A :class:`StackPass` travels to the attention layers as a keyword argument, so that activation checkpointing captures
it with the layer's other arguments and a replay draws the same masks, whatever has happened since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masks, ops
from ..errors import DataError
from ..masks import MaskKey
from .sites import Site, SiteDrop

if TYPE_CHECKING:
    from .tokens import Tokens


@dataclass(frozen=True, eq=False)
class DrawnMask:
    """One mask as it was drawn: ``keep`` bool (documents, heads, rows, columns), ``samples`` and ``lengths`` (documents,)."""

    key: MaskKey
    drop: SiteDrop
    samples: np.ndarray
    lengths: np.ndarray
    keep: Tensor


MaskRecorder = Callable[[DrawnMask], None]


@dataclass(eq=False)
class StackPass:
    """What a forward pass through one stack needs to draw its masks: a pure function of these values."""

    seed: int
    step: int
    tokens: Tokens
    encoder_tokens: Tokens | None = None
    sites: Mapping[nn.Module, Site] = field(default_factory=dict)
    """The attention sites of the attached model, by module."""
    impl: str = "auto"
    running: bool = True
    """True during the stack's forward pass itself, False afterwards, in a checkpoint's replay too."""
    recorder: MaskRecorder | None = None
    group_calls: int = 0
    reached: set[Site] = field(default_factory=set)

    def counts(self, site: Site) -> bool:
        """Whether what the site does now is to be counted: not in a replay. The head runs after the stack."""
        return self.running or site.kind == "output"

    def column_tokens(self, site: Site) -> Tokens:
        """The tokens that are this site's columns: the encoder's for cross-attention, else the stack's own."""
        if site.kind != "cross-attention":
            return self.tokens
        if self.encoder_tokens is None:
            raise DataError(
                "cross-attention ran without encoder_hidden_states (got None); pass the encoder's output to the decoder"
            )
        return self.encoder_tokens


def attention_keep(
    step: StackPass, site: Site, drop: SiteDrop, depth: int, heads: int, queries: int, keys: int
) -> Tensor:
    """Keep mask of an attention site over the batch: bool (B, heads, 1 or queries, keys), True = keep.

    ``heads`` is the number that the mask is drawn for: key/value heads or query heads, as the site says.
    """
    columns, rows = step.column_tokens(site), step.tokens
    if columns.document.shape[1] != keys or (drop.pattern == "element" and rows.document.shape[1] != queries):
        raise DataError(
            f"attention runs over other tokens than the batch holds (got {queries} queries and {keys} keys for "
            f"{rows.document.shape[1]} and {columns.document.shape[1]} tokens); train with use_cache=False"
        )
    drawn = _draw(step, site, drop, depth, columns, rows.columns, columns.columns, heads)
    if columns.aligned and (drop.pattern != "element" or rows.aligned):
        down = queries - drawn.shape[2] if drop.pattern == "element" else 0
        return F.pad(drawn, (0, keys - drawn.shape[3], 0, down))
    if drop.pattern != "element":
        return drawn[columns.document, :, 0, columns.position].permute(0, 2, 1)[:, :, None]
    if drawn.shape[3] == 0:
        return drawn.new_zeros(rows.document.shape[0], heads, queries, keys)
    # Pairs of different documents are no pairs of a mask: a well-formed packed batch forbids them anyway.
    where = (rows.document[:, :, None], slice(None), rows.position[:, :, None], columns.position[:, None, :])
    return drawn[where].permute(0, 3, 1, 2)


def hidden_keep(step: StackPass, site: Site, drop: SiteDrop, depth: int, features: int) -> Tensor:
    """Keep mask of hidden states over the batch: bool (B, L, features) for elements, (B, L, 1) for tokens."""
    tokens = step.tokens
    length = tokens.document.shape[1]
    if drop.pattern == "element":
        drawn = _draw(step, site, drop, depth, tokens, tokens.columns, features, 1)[:, 0]
        if tokens.aligned:
            return F.pad(drawn, (0, 0, 0, length - drawn.shape[1]))
        return drawn[tokens.document, tokens.position]
    drawn = _draw(step, site, drop, depth, tokens, 1, tokens.columns, 1)[:, 0, 0]
    if tokens.aligned:
        return F.pad(drawn, (0, length - drawn.shape[1]))[:, :, None]
    return drawn[tokens.document, tokens.position][:, :, None]


def pooled_keep(step: StackPass, site: Site, drop: SiteDrop, features: int) -> Tensor:
    """Keep mask of one vector an example (row 0 of the element pattern): bool (B, features)."""
    if step.tokens.packed:
        raise DataError(
            "the head receives one vector a row, but rows hold several documents (got packed sample ids); "
            "do not pack examples for a classification head"
        )
    return _draw(step, site, drop, 0, step.tokens, 1, features, 1)[:, 0, 0]


def _draw(
    step: StackPass, site: Site, drop: SiteDrop, depth: int, tokens: Tokens, rows: int, columns: int, heads: int
) -> Tensor:
    """Masks of every document, bool (documents, heads, rows or 1, columns), on the tokens' device."""
    device = tokens.document.device
    parts = []
    for branch in np.unique(tokens.branches):
        chosen = tokens.branches == branch
        key = MaskKey(step.seed, step.step, int(branch), depth, site.site)
        samples, lengths = tokens.samples[chosen], tokens.lengths[chosen]
        draw = _draw_on_host if device.type == "cpu" else _draw_on_device
        keep = draw(key, drop, samples, lengths, rows, columns, heads, device)
        if step.recorder is not None and step.counts(site):
            step.recorder(DrawnMask(key, drop, samples, lengths, keep))
        parts.append(keep)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _draw_on_host(
    key: MaskKey,
    drop: SiteDrop,
    samples: np.ndarray,
    lengths: np.ndarray,
    rows: int,
    columns: int,
    heads: int,
    device: torch.device,
) -> Tensor:
    if drop.pattern == "element":
        bits = masks.element(key, samples, rows, columns, drop.rate, heads=heads)
    elif drop.pattern == "column":
        bits = masks.column(key, samples, columns, drop.rate, heads=heads)
    else:
        bits = masks.span(key, samples, lengths, drop.rate, heads=heads)
    return bits.to_torch(device)


def _draw_on_device(
    key: MaskKey,
    drop: SiteDrop,
    samples: np.ndarray,
    lengths: np.ndarray,
    rows: int,
    columns: int,
    heads: int,
    device: torch.device,
) -> Tensor:
    site_key = ops.derive_key(key.seed, key.step, key.branch, key.layer, masks.SITES[key.site])
    ids = torch.from_numpy(samples).to(device)
    if drop.pattern == "element":
        return ops.element_keep(site_key, ids, rows, columns, drop.threshold, heads)
    if drop.pattern == "column":
        return ops.column_keep(site_key, ids, columns, drop.threshold, heads)
    return ops.span_keep(site_key, ids, torch.from_numpy(lengths).to(device), columns, drop.threshold, heads)


def guided_keep(step: StackPass, site: Site, drop: SiteDrop, depth: int) -> Tensor:
    """Keep mask of an attention-guided HiddenCut span, bool (B, L, 1): it starts at a much-attended token.

    Not planned ahead and outside the purity promise: it depends on this forward pass's attention weights.
    """
    tokens = step.tokens
    if tokens.packed or site.layer.received is None:
        raise DataError(
            "an attention-guided span needs one document a row and a self-attention in its layer (got packed rows or "
            'no attention); use start="uniform"'
        )
    draws = []
    for sample, branch in zip(tokens.samples.tolist(), tokens.branches.tolist(), strict=True):
        key = ops.derive_key(step.seed, step.step, branch, depth, masks.SITES[site.site])
        draws.append(ops.span_draw(key, sample))
    lengths = torch.from_numpy(tokens.lengths).to(tokens.real.device)
    received = site.layer.received.masked_fill(~tokens.real, -1.0)
    span = ops.guided_span(received, tokens.real, lengths, torch.tensor(draws, device=received.device), drop.threshold)
    return span[:, :, None]
