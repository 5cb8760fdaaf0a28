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
from ..errors import DataError, UnsupportedModelError
from ..masks import MaskKey
from .sites import Site, SiteDrop

if TYPE_CHECKING:
    from ..plan import StepPlan
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
    plans: tuple[StepPlan, StepPlan] = field(kw_only=True)
    """Column and span masks of every site: over the stack's own tokens, and over the encoder's (cross-attention)."""
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
    if drop.pattern != "element":
        return columns.lay(_planned(step, site, drop, depth, heads)[:, :, 0])[:, :, None]
    drawn = _drawn(step, site, drop, depth, columns, rows.columns, columns.columns, heads)
    if columns.aligned and rows.aligned:
        return F.pad(drawn, (0, keys - drawn.shape[3], 0, queries - drawn.shape[2]))
    if drawn.shape[3] == 0:
        return drawn.new_zeros(rows.document.shape[0], heads, queries, keys)
    # Pairs of different documents are no pairs of a mask: a well-formed packed batch forbids them anyway.
    where = (rows.document[:, :, None], slice(None), rows.position[:, :, None], columns.position[:, None, :])
    return drawn[where].permute(0, 3, 1, 2)


def drop_tokens(step: StackPass, site: Site, drop: SiteDrop, depth: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, L, D) after this site's dropout, and how many real places (or tokens) were kept, int64 ()."""
    tokens = step.tokens
    if drop.pattern != "element":
        if drop.start == "attention":
            keep = guided_keep(step, site, drop, depth)
        else:
            keep = tokens.lay(_planned(step, site, drop, depth, 1)[:, :, 0])[:, 0]
        return ops.drop_rows(hidden, keep.flatten(), drop.scale), (keep & tokens.real).count_nonzero()
    if step.recorder is not None and step.counts(site):
        # Whoever wants to see the masks gets the very ones that are applied, so here they have to exist.
        drawn = _drawn(step, site, drop, depth, tokens, tokens.columns, hidden.shape[-1], 1)[:, 0]
        keep = drawn[tokens.document, tokens.position] & tokens.real[..., None]
        return ops.drop_hidden(hidden, keep, drop.scale), keep.count_nonzero()
    return _drop_elements(step, site, drop, depth, hidden, tokens.row_samples, tokens.row_positions)


def drop_pooled(step: StackPass, site: Site, drop: SiteDrop, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """One vector an example, (B, D), after dropout (row 0 of the element pattern), and how many places were kept."""
    tokens = step.tokens
    if tokens.packed:
        raise DataError(
            "the head receives one vector a row, but rows hold several documents (got packed sample ids); "
            "do not pack examples for a classification head"
        )
    if step.recorder is not None:
        keep = _drawn(step, site, drop, 0, tokens, 1, hidden.shape[-1], 1)[:, 0, 0]
        return ops.drop_hidden(hidden, keep, drop.scale), keep.count_nonzero()
    samples = torch.from_numpy(tokens.samples).to(hidden.device)
    return _drop_elements(step, site, drop, 0, hidden, samples, torch.zeros_like(samples))


def _drop_elements(
    step: StackPass, site: Site, drop: SiteDrop, depth: int, hidden: Tensor, samples: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    keys = [_key(step, site, depth, branch).derive() for branch in step.tokens.branch_order]
    drawn_from = torch.tensor(keys, device=hidden.device)
    return ops.drop_elements(hidden, drawn_from, samples, positions, drop.threshold, drop.scale)


def _key(step: StackPass, site: Site, depth: int, branch: int) -> MaskKey:
    return MaskKey(step.seed, step.step, branch, depth, site.site)


def _planned(step: StackPass, site: Site, drop: SiteDrop, depth: int, heads: int) -> Tensor:
    """A column or span mask out of the step's plan: bool (documents, heads, 1, columns), on the tokens' device."""
    plan = step.plans[site.kind == "cross-attention"]
    tokens = step.column_tokens(site)
    keep = plan.mask(depth, site.site).to_torch(tokens.document.device)
    if keep.shape[1] != heads:
        raise UnsupportedModelError(
            f"attention has another number of heads than the model's configuration says (got {heads}, planned "
            f"{keep.shape[1]}); the model's code differs from the family's"
        )
    if step.recorder is not None and step.counts(site):
        for branch in tokens.branch_order:
            _record(step, site, drop, depth, tokens, branch, keep[torch.from_numpy(tokens.branches == branch)])
    return keep


def _drawn(
    step: StackPass, site: Site, drop: SiteDrop, depth: int, tokens: Tokens, rows: int, columns: int, heads: int
) -> Tensor:
    """Element masks of every document, bool (documents, heads, rows, columns), on the tokens' device."""
    device = tokens.document.device
    parts = []
    for branch in tokens.branch_order:
        key, samples = _key(step, site, depth, branch), tokens.samples[tokens.branches == branch]
        if device.type == "cpu":
            keep = torch.from_numpy(masks.element_bool(key, samples, rows, columns, drop.rate, heads=heads))
        else:
            ids = torch.from_numpy(samples).to(device)
            keep = ops.element_keep(key.derive(), ids, rows, columns, drop.threshold, heads)
        if step.recorder is not None and step.counts(site):
            _record(step, site, drop, depth, tokens, branch, keep)
        parts.append(keep)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _record(
    step: StackPass, site: Site, drop: SiteDrop, depth: int, tokens: Tokens, branch: int, keep: Tensor
) -> None:
    if step.recorder is not None:
        chosen = tokens.branches == branch
        key = _key(step, site, depth, branch)
        step.recorder(DrawnMask(key, drop, tokens.samples[chosen], tokens.lengths[chosen], keep))


def guided_keep(step: StackPass, site: Site, drop: SiteDrop, depth: int) -> Tensor:
    """Keep mask of an attention-guided HiddenCut span, bool (B, L): it starts at a much-attended token.

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
        draws.append(ops.span_draw(_key(step, site, depth, branch).derive(), sample))
    lengths = torch.from_numpy(tokens.lengths).to(tokens.real.device)
    received = site.layer.received.masked_fill(~tokens.real, -1.0)
    return ops.guided_span(received, tokens.real, lengths, torch.tensor(draws, device=received.device), drop.threshold)
