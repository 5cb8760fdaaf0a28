"""One forward pass through one stack, and the masks that its sites draw for it.

A :class:`StackPass` travels to the attention layers as a keyword argument, so that activation checkpointing captures
it with the layer's other arguments and a replay draws the same masks, whatever has happened since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .. import masks, ops
from ..errors import DataError
from ..masks import MaskKey
from ..transfer import to_device
from .prepared import PreparedPass, check_heads, no_encoder, pairs_seen
from .sites import Site, SiteDrop

if TYPE_CHECKING:
    from ..ops import Documents
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


class StackPass:
    """What a forward pass through one stack needs to draw its masks: a pure function of these values.

    No dataclass: FSDP looks for tensors in whatever a layer receives, walks through dataclasses and makes new ones.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        tokens: Tokens,
        encoder_tokens: Tokens | None,
        sites: Mapping[nn.Module, Site],
        impl: str,
        kernels: bool,
        recorder: MaskRecorder | None,
        plans: tuple[StepPlan, StepPlan],
        dropping: list[Site],
    ) -> None:
        self.seed, self.step, self.tokens, self.encoder_tokens = seed, step, tokens, encoder_tokens
        self.sites = sites
        """The attention sites of the attached model, by module."""
        self.impl, self.recorder = impl, recorder
        self.kernels = kernels
        """Whether the Triton kernels compute attention (``impl="auto"``: where they can) and HiddenCut."""
        self.running = True
        """True during the stack's forward pass itself, False afterwards, in a checkpoint's replay too."""
        self.plans = plans
        """Column and span masks of every site: over the stack's own tokens, and over the encoder's (cross-attention)."""
        self.dropping = dropping
        """The sites that drop in this pass."""
        self._keys: dict[tuple[str, int], Tensor] = {}
        self._planned: dict[int, dict[tuple[int, str], Tensor]] = {}
        self._pairs: dict[tuple[str, bool, int | None], int] = {}
        self.suspect = self.apart = False
        """Whether its first attention is to show that the documents of a row do not attend to each other; has shown it."""
        self.agreed: list[Tensor] = []
        """Masks of pairs that were found to say what the documents say; for the Triton kernels."""
        self.group_calls = 0
        self._zeros: list[Tensor] = []
        self.reached: set[Site] = set()
        self._runs: dict[int, Documents] = {}

    def counts(self, site: Site) -> bool:
        """Whether what the site does now is to be counted: not in a replay. The head runs after the stack."""
        return self.running or site.kind == "output"

    def visit(self, site: Site) -> None:
        """The site's module was called."""
        if self.counts(site):
            self.reached.add(site)
            site.calls += 1

    def count(self, site: Site, depth: int, kept: Tensor, total: Tensor | int) -> None:
        """So many of the pairs or places that the site could drop were kept, int64 ()."""
        if self.counts(site):
            site.count(depth, kept, total)

    def zero(self) -> Tensor:
        """A zero, int64 () on the device, for a kernel to count into: they are made for all sites at once."""
        if not self._zeros:
            many = sum(len(site.drops) for site in self.dropping) or 1
            # 16 bytes each: kernels are launched faster where pointers are aligned.
            zeros = torch.zeros(many, 2, dtype=torch.int64, device=self.tokens.document.device)
            self._zeros = list(zeros[:, 0].unbind())
        return self._zeros.pop()

    def column_tokens(self, site: Site) -> Tokens:
        """The tokens that are this site's columns: the encoder's for cross-attention, else the stack's own."""
        if not site.crosses:
            return self.tokens
        if self.encoder_tokens is None:
            raise no_encoder()
        return self.encoder_tokens

    def documents(self, site: Site) -> Documents:
        """The runs of tokens that attend to each other."""
        return self.runs(site.side)

    def runs(self, side: int) -> Documents:
        """The documents of one side of :class:`.Site`: 0, the stack's own tokens, or 1, those beside the encoder's."""
        if side not in self._runs:
            own = self._runs.get(0) or _runs(self.tokens)
            self._runs[0] = own
            if side:
                if self.encoder_tokens is None:
                    raise no_encoder()
                self._runs[side] = ops.Documents.across(own, _runs(self.encoder_tokens))
        return self._runs[side]

    def keeps_some(self, site: Site, drop: SiteDrop, depth: int) -> bool:
        """Whether a planned mask leaves every document at least one key, for every head."""
        tokens = self.column_tokens(site)
        if drop.pattern == "element" or not tokens.told:
            return False
        kept = self.plans[site.side].kept(depth, site.site)
        return bool(kept[tokens.lengths > 0].all())

    def laid(self, site: Site, drop: SiteDrop, depth: int, heads: int) -> Tensor:
        """A column or span mask over the batch, bool (B, heads, L); False at padding."""
        return self.column_tokens(site).lay(self.columns(site, drop, depth, heads))

    def columns(self, site: Site, drop: SiteDrop, depth: int, heads: int) -> Tensor:
        """A column or span mask in the documents' own coordinates, bool (documents, heads, columns)."""
        return _planned(self, site, drop, depth, heads)[:, :, 0]

    def pairs(self, site: Site, drop: SiteDrop, depth: int, heads: int) -> Tensor:
        """An element mask of attention over the batch, bool (B, heads, Q, K)."""
        columns, rows = self.column_tokens(site), self.tokens
        drawn = _drawn(self, site, drop, depth, columns, rows.columns, columns.columns, heads)
        aligned = columns.aligned and rows.aligned
        return ops.lay_pairs(drawn, rows.document, rows.position, columns.position, aligned=aligned)

    def keys(self, site: Site, depth: int) -> Tensor:
        """The site's keys, int64 (branches, 2)."""
        if (site.site, depth) not in self._keys:
            # Of all sites at once: a transfer to the device takes the host as long as a small layer.
            wanted = ((one.site, d, drop) for one in self.dropping for d, drop in one.drops.items())
            places = dict.fromkeys(
                (name, d) for name, d, drop in wanted if drop.pattern == "element"
            )  # others are planned
            places[site.site, depth] = None
            order = self.tokens.branch_order
            found = [[MaskKey(self.seed, self.step, b, d, name).derive() for b in order] for name, d in places]
            table = to_device(torch.tensor(found), self.tokens.document.device)
            self._keys = dict(zip(places, table.unbind(), strict=True))
        return self._keys[site.site, depth]

    def planned(self, site: Site, depth: int) -> Tensor:
        """A column or span mask out of the step's plan: bool (documents, heads, 1, columns), on the tokens' device."""
        if site.side not in self._planned:  # all of them at once, as above
            self._planned[site.side] = self.plans[site.side].all_to_torch(self.tokens.document.device)
        return self._planned[site.side][depth, site.site]

    def allowed_pairs(self, site: Site, causal: bool, window: int | None) -> int:
        """How many (query, key) pairs of all documents the mask allows, for one head."""
        how = (site.kind, causal, window)
        if how not in self._pairs:
            keys = self.column_tokens(site).lengths if site.crosses else None
            self._pairs[how] = int(pairs_seen(self.tokens.lengths, keys, causal, window).sum())
        return self._pairs[how]

    def draws(self, site: Site, depth: int) -> Tensor:
        """The 32-bit draw of every document's span at this site, int64 (documents,)."""
        tokens = self.tokens
        found = []
        for sample, branch in zip(tokens.samples.tolist(), tokens.branches.tolist(), strict=True):
            found.append(ops.span_draw(_key(self, site, depth, branch).derive(), sample))
        return to_device(torch.tensor(found), tokens.document.device)


Pass = StackPass | PreparedPass
"""What sites take their masks from: drawn as they are asked for, or laid out before the model was called."""


def attention_keep(
    stack_pass: Pass, site: Site, drop: SiteDrop, depth: int, heads: int, queries: int, keys: int
) -> Tensor:
    """Keep mask of an attention site over the batch: bool (B, heads, 1 or queries, keys), True = keep.

    ``heads`` is the number that the mask is drawn for: key/value heads or query heads, as the site says.
    """
    check_extent(stack_pass, site, queries if drop.pattern == "element" else None, keys)
    if drop.pattern != "element":
        return stack_pass.laid(site, drop, depth, heads)[:, :, None]
    return stack_pass.pairs(site, drop, depth, heads)


def check_extent(stack_pass: Pass, site: Site, queries: int | None, keys: int) -> None:
    """A :class:`DataError` if attention runs over other keys than the batch's tokens, or (not ``None``) other queries."""
    columns, rows = stack_pass.column_tokens(site).document.shape[1], stack_pass.tokens.document.shape[1]
    if columns != keys or queries not in (None, rows):
        raise DataError(
            f"attention runs over other tokens than the batch holds (got {queries or rows} queries and {keys} keys for "
            f"{rows} and {columns} tokens); train with use_cache=False"
        )


def check_apart(stack_pass: Pass, site: Site, allowed: Tensor | None) -> None:
    """A :class:`DataError` if documents of a row attend to each other: not every model heeds ``position_ids``."""
    document, real = stack_pass.tokens.document, stack_pass.tokens.real
    strange = (document[:, :, None] != document[:, None, :]) & real[:, :, None] & real[:, None, :]
    if allowed is None or bool((strange[:, None] & allowed).any()):
        raise DataError(
            f"the documents of packed rows would attend to each other (got {site.name}, which does not heed position_ids "
            "here); give a decoder position_ids that restart and use_cache=False, pass a mask of (batch, 1, length, length), "
            "or do not pack for this model"
        )
    stack_pass.suspect, stack_pass.apart = False, True


def drop_tokens(stack_pass: Pass, site: Site, drop: SiteDrop, depth: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, L, D) after this site's dropout, and how many real places (or tokens) were kept, int64 ()."""
    tokens = stack_pass.tokens
    if drop.pattern != "element":
        guided = drop.start == "attention"
        keep = guided_keep(stack_pass, site, drop, depth) if guided else stack_pass.laid(site, drop, depth, 1)[:, 0]
        rows = ops.triton_hidden.drop_rows if _by_kernels(stack_pass, hidden) else ops.drop_rows
        return rows(hidden, keep.flatten(), drop.scale), (keep & tokens.real).count_nonzero()
    if isinstance(stack_pass, StackPass) and stack_pass.recorder is not None:
        # Whoever wants to see the masks gets the very ones that are applied, so here they have to exist: in a replay too,
        # which must store what the forward pass stored.
        drawn = _drawn(
            stack_pass, site, drop, depth, stack_pass.tokens, stack_pass.tokens.columns, hidden.shape[-1], 1
        )[:, 0]
        keep = drawn[tokens.document, tokens.position] & tokens.real[..., None]
        return ops.drop_hidden(hidden, keep, drop.scale), keep.count_nonzero()
    where = (stack_pass.keys(site, depth), tokens.row_samples, tokens.row_positions, drop.threshold, drop.scale)
    if _by_kernels(stack_pass, hidden):
        return ops.triton_hidden.drop_elements(hidden, *where, count=stack_pass.zero())
    return ops.drop_elements(hidden, *where)


def _by_kernels(stack_pass: Pass, hidden: Tensor) -> bool:
    """Whether HiddenCut is Triton's; asked for by name it is in any case, and says what it cannot do."""
    if not stack_pass.kernels:
        return False
    return stack_pass.impl == "triton" or ops.triton_hidden.obstacle(hidden) is None


def drop_pooled(stack_pass: Pass, site: Site, drop: SiteDrop, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """One vector an example, (B, D), after dropout (row 0 of the element pattern), and how many places were kept."""
    tokens = stack_pass.tokens
    if tokens.packed:
        raise DataError(
            "the head receives one vector a row, but rows hold several documents (got packed sample ids); "
            "do not pack examples for a classification head"
        )
    if isinstance(stack_pass, StackPass) and stack_pass.recorder is not None:
        keep = _drawn(stack_pass, site, drop, 0, stack_pass.tokens, 1, hidden.shape[-1], 1)[:, 0, 0]
        return ops.drop_hidden(hidden, keep, drop.scale), keep.count_nonzero()
    places = (tokens.sample_ids, torch.zeros_like(tokens.sample_ids))
    return ops.drop_elements(hidden, stack_pass.keys(site, 0), *places, drop.threshold, drop.scale)


def guided_keep(stack_pass: Pass, site: Site, drop: SiteDrop, depth: int) -> Tensor:
    """Keep mask of an attention-guided HiddenCut span, bool (B, L): it starts at a much-attended token.

    Not planned ahead and outside the purity promise: it depends on this forward pass's attention weights.
    """
    tokens = stack_pass.tokens
    if tokens.packed or site.layer.received is None:
        raise DataError(
            "an attention-guided span needs one document a row and a self-attention in its layer (got packed rows or "
            'no attention); use start="uniform"'
        )
    received = site.layer.received.masked_fill(~tokens.real, -1.0)
    return ops.guided_span(received, tokens.real, tokens.real_lengths, stack_pass.draws(site, depth), drop.threshold)


def _runs(tokens: Tokens) -> Documents:
    if tokens.aligned and not tokens.packed and len(tokens.samples):
        return ops.Documents.of_rows(tokens.samples, tokens.lengths, tokens.document.shape[1], tokens.document.device)
    return ops.Documents.of_tokens(tokens.samples, tokens.document, tokens.position, tokens.real)


def _key(stack_pass: StackPass, site: Site, depth: int, branch: int) -> MaskKey:
    return MaskKey(stack_pass.seed, stack_pass.step, branch, depth, site.site)


def _planned(stack_pass: StackPass, site: Site, drop: SiteDrop, depth: int, heads: int) -> Tensor:
    """A column or span mask out of the step's plan: bool (documents, heads, 1, columns), on the tokens' device."""
    tokens = stack_pass.column_tokens(site)
    keep = stack_pass.planned(site, depth)
    check_heads(heads, planned=keep.shape[1])
    if stack_pass.recorder is not None and stack_pass.counts(site):
        for branch in tokens.branch_order:
            _record(stack_pass, site, drop, depth, tokens, branch, keep[torch.from_numpy(tokens.branches == branch)])
    return keep


def _drawn(
    stack_pass: StackPass, site: Site, drop: SiteDrop, depth: int, tokens: Tokens, rows: int, columns: int, heads: int
) -> Tensor:
    """Element masks of every document, bool (documents, heads, rows, columns), on the tokens' device."""
    device = tokens.document.device
    parts = []
    for branch in tokens.branch_order:
        key, samples = _key(stack_pass, site, depth, branch), tokens.samples[tokens.branches == branch]
        if device.type == "cpu":
            keep = torch.from_numpy(masks.element_bool(key, samples, rows, columns, drop.rate, heads=heads))
        else:
            ids = to_device(torch.from_numpy(samples), device)
            keep = ops.element_keep(key.derive(), ids, rows, columns, drop.threshold, heads)
        if stack_pass.recorder is not None and stack_pass.counts(site):
            _record(stack_pass, site, drop, depth, tokens, branch, keep)
        parts.append(keep)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _record(
    stack_pass: StackPass, site: Site, drop: SiteDrop, depth: int, tokens: Tokens, branch: int, keep: Tensor
) -> None:
    if stack_pass.recorder is not None:
        chosen = tokens.branches == branch
        key = _key(stack_pass, site, depth, branch)
        stack_pass.recorder(DrawnMask(key, drop, tokens.samples[chosen], tokens.lengths[chosen], keep))
