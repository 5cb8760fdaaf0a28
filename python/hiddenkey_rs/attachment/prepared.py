"""A pass laid out before its model is called, for compiled models: what sites then take from it are tensors alone.

A graph must not depend on numbers that change with every step, and nothing in it can ask the host. So the keys of all
sites, all column and span masks, and every token's place are made first and are inputs of the graph, like the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..errors import ConfigError, DataError, StateError, UnsupportedModelError
from ..masks import MaskKey
from ..transfer import to_device
from .sites import Site, SiteDrop

if TYPE_CHECKING:
    from ..ops import Documents
    from ..plan import StepPlan
    from .passes import StackPass
    from .tokens import Tokens


GRAPHED = ("cuda",)
"""Devices whose graphs are recorded and replayed."""


@torch.library.custom_op("hiddenkey_rs::held", mutates_args=())
def held(given: Tensor) -> Tensor:
    """A copy that belongs to the graph that makes it.

    Backward keeps it in place of what the graph was given. CUDA graphs expect that at one address in all steps, and are
    recorded anew where it is not.
    """
    return given.clone()


@held.register_fake
def _(given: Tensor) -> Tensor:
    return torch.empty_like(given)


Slots = Mapping[tuple[str, int], int]
"""(kind of site, depth) -> its number among everything that drops in a stack, and behind it."""


@dataclass(eq=False)
class Places:
    """What a graph reads of :class:`.Tokens`, under the same names."""

    document: Tensor
    position: Tensor
    real: Tensor
    row_samples: Tensor
    row_positions: Tensor
    real_count: Tensor
    sample_ids: Tensor
    real_lengths: Tensor
    packed: bool

    @staticmethod
    def of(tokens: Tokens) -> Places:
        """The tensors of ``tokens``."""
        return Places(
            # Rows of a broadcast: a graph would compile anew for other strides.
            tokens.document.contiguous(),
            tokens.position,
            tokens.real,
            tokens.row_samples,
            tokens.row_positions,
            to_device(torch.tensor(tokens.real_count), tokens.document.device),
            tokens.sample_ids,
            tokens.real_lengths,
            tokens.packed,
        )


class PreparedPass:
    """What a forward pass of a compiled model takes its masks from. Methods and their results as :class:`.StackPass`.

    Counts are added up in ``counter``, int64 (slots, 3): kept, total, calls. It is the same tensor in every step, and
    changed in place, because a graph's results can leave a checkpointed layer in no other way.
    """

    def __init__(self, stack_pass: StackPass, slots: Slots, sites: list[Site], counter: Tensor) -> None:
        self.sites: Mapping[nn.Module, Site] = stack_pass.sites
        self.impl = stack_pass.impl
        self.running = True
        self.suspect = self.apart = False
        self.group_calls = 0
        self.handed: Any = None
        """What the layers that both passes share hand on in place of their own output, in the second pass."""
        self.left: Any = None
        """What the last of them made in the gradient pass."""
        self.slots, self.counter = slots, counter
        self.tokens = Places.of(stack_pass.tokens)
        self.encoder_tokens = None if stack_pass.encoder_tokens is None else Places.of(stack_pass.encoder_tokens)
        own, cross = stack_pass.plans
        self._planned = (
            _lay_all(own, stack_pass.tokens),
            _lay_all(cross, stack_pass.encoder_tokens or stack_pass.tokens),
        )
        self._heads = {**_first_heads(own), **_first_heads(cross)}
        self._runs = _all_runs(stack_pass)
        self.kernels = self._runs is not None
        """As :attr:`.StackPass.kernels`."""
        widths = [tokens.document.shape[1] for tokens in (self.tokens, self.encoder_tokens) if tokens is not None]
        self._flags = [_flags(*side) for side in zip((own, cross), self._runs or (), widths, strict=False)]
        self._keys, self._words = _keys(stack_pass, slots, sites)
        self._extents = (
            _extent(stack_pass.tokens, stack_pass.tokens),
            _extent(stack_pass.tokens, stack_pass.encoder_tokens or stack_pass.tokens),
        )
        self._draws = {
            (site.kind, depth): stack_pass.draws(site, depth)
            for site in sites
            for depth, drop in site.drops.items()
            if drop.start == "attention"
        }

    def hold(self) -> None:
        """In a graph, as the stack's pass begins: sizes, and what backward will ask for, are the graph's own from here on."""
        beside = self.encoder_tokens or self.tokens
        for runs, columns in zip(self._runs or (), (self.tokens, beside), strict=False):
            # Of tensors, so that a graph is of any length. The documents are this pass's own.
            object.__setattr__(runs, "queries", self.tokens.document.shape[1])
            object.__setattr__(runs, "keys", columns.document.shape[1])
            object.__setattr__(runs, "positions", columns.document.shape[1])
        if self._keys.device.type not in GRAPHED:
            return
        self._keys = held(self._keys)
        self._flags = [None if flags is None else held(flags) for flags in self._flags]
        for tokens in (self.tokens, self.encoder_tokens):
            if tokens is not None:
                tokens.row_samples, tokens.row_positions = held(tokens.row_samples), held(tokens.row_positions)
        for runs in self._runs or ():
            object.__setattr__(runs, "table", held(runs.table))

    def counts(self, site: Site) -> bool:
        """Whether this is the forward pass itself and no replay."""
        return self.running

    def visit(self, site: Site) -> None:
        """Calls are counted where something is dropped."""

    def count(self, site: Site, depth: int, kept: Tensor, total: Any) -> None:
        """Add to the counter."""
        if self.running:
            self.counter[self.slots[site.kind, depth]].add_(torch.stack((kept, total, torch.ones_like(total))))

    def column_tokens(self, site: Site) -> Places:
        """The tokens that are this site's columns."""
        if not site.crosses:
            return self.tokens
        if self.encoder_tokens is None:
            raise no_encoder()
        return self.encoder_tokens

    def laid(self, site: Site, drop: SiteDrop, depth: int, heads: int) -> Tensor:
        """A column or span mask over the batch."""
        first = self._first(site, depth, heads)
        laid = self._planned[site.side]
        assert laid is not None  # as something was planned there
        return laid[first : first + heads].transpose(0, 1)

    def documents(self, site: Site) -> Documents:
        """The runs of tokens that attend to each other, as long as rows are: a graph asks for no lengths."""
        assert self._runs is not None  # who has none does not ask
        return self._runs[site.side]

    def columns(self, site: Site, drop: SiteDrop, depth: int, heads: int) -> Tensor:
        """A column or span mask in the documents' own coordinates."""
        first = self._first(site, depth, heads)
        flags = self._flags[site.side]
        assert flags is not None  # as something was planned there
        many = len(self.tokens.sample_ids)
        return flags[first * many : (first + heads) * many].view(many, heads, flags.shape[1])

    def _first(self, site: Site, depth: int, heads: int) -> int:
        """Where a planned mask's heads begin among those of its plan."""
        first, planned = self._heads[site.site, depth]
        check_heads(heads, planned)
        return first

    def allowed_pairs(self, site: Site, causal: bool, window: int | None) -> Tensor:
        """How many pairs the mask allows, for one head."""
        table = self.documents(site).table
        return pairs_seen(table[:, 2], table[:, 4] if site.crosses else None, causal, window).sum()

    def zero(self) -> Literal[True]:
        """A graph lets its kernels' operators make the zeros that they count into."""
        return True

    def pairs(self, site: Site, drop: SiteDrop, depth: int, heads: int) -> Tensor:
        """An element mask of attention over the batch."""
        columns, rows = self.column_tokens(site), self.tokens
        words = self._words[self.slots[site.kind, depth]]
        extent = self._extents[site.side]
        places = (rows.document, rows.position, columns.position)
        return ops.element_pairs(words, columns.sample_ids, extent, *places, drop.threshold, heads)

    def keys(self, site: Site, depth: int) -> Tensor:
        """The site's keys."""
        return self._keys[self.slots[site.kind, depth]]

    def draws(self, site: Site, depth: int) -> Tensor:
        """The draws of a guided span."""
        return self._draws[site.kind, depth]

    def finish(self, sites: list[Site]) -> Tensor:
        """The model's call is over: hand the counts on to the sites, and return them, like ``counter``."""
        self.running = False
        totals = self.counter.clone()
        self.counter.zero_()
        for site in sites:
            for depth in site.drops:
                slot = self.slots[site.kind, depth]
                site.count(depth, totals[slot, 0], totals[slot, 1])
                site.calls += 1
        return totals


_caller = 0
CALLED: list[PreparedPass | None] = []
"""By stack, the passes of the compiled model that is being called.

A graph finds them here, not by way of the model: of what a module holds it would take the address for fixed, and the sizes.
"""


@contextmanager
def called_with(passes: Sequence[PreparedPass | None]) -> Iterator[None]:
    """A call of a compiled model that is to take its masks from ``passes``."""
    global _caller
    before, thread = list(CALLED), threading.get_ident()
    if before and _caller != thread:
        raise StateError(
            f"another thread is calling a compiled model (got threads {_caller} and {thread}); call one at a time"
        )
    CALLED[:], _caller = passes, thread
    try:
        yield
    finally:
        CALLED[:] = before


def slots_of(sites: list[Site]) -> Slots:
    """Numbers for everything that ``sites`` drop."""
    places = dict.fromkeys((site.kind, depth) for site in sites for depth in site.drops)
    return {place: number for number, place in enumerate(places)}


def pairs_seen(lengths: Any, keys: Any, causal: bool, window: int | None) -> Any:
    """How many (query, key) pairs a head may see in documents of so many tokens, arrays or tensors of int64.

    ``keys``: what cross-attention reads, else ``None``.
    """
    if keys is not None:
        return lengths * keys
    reach = lengths if window is None else lengths.clip(max=window)
    back = reach * (reach + 1) // 2 + (lengths - reach) * reach  # the own key, and those before it
    return back if causal else 2 * back - lengths


def check_heads(heads: int, planned: int) -> None:
    """An :class:`UnsupportedModelError` if masks were planned for another number of heads than attention has."""
    if heads != planned:
        raise UnsupportedModelError(
            f"attention has another number of heads than the model's configuration says (got {heads}, planned "
            f"{planned}); the model's code differs from the family's"
        )


def no_encoder() -> DataError:
    """What a cross-attention says that has no keys."""
    return DataError(
        "cross-attention ran without encoder_hidden_states (got None); pass the encoder's output to the decoder"
    )


def _lay_all(plan: StepPlan, tokens: Tokens) -> Tensor | None:
    """Every mask of a plan over the batch, bool (heads of all entries, B, L), in one transfer to the device."""
    if not plan.entries:
        return None
    drawn = plan.all_to_torch(tokens.document.device)
    # Every mask by itself: it is (documents, heads, 1, columns).
    laid = [tokens.lay(drawn[entry.layer, entry.site][:, :, 0]).transpose(0, 1) for entry in plan.entries]
    return torch.cat(laid)


def _all_runs(stack_pass: StackPass) -> list[Documents] | None:
    """The documents that kernels would walk over, of both sides of :class:`.Site`; ``None`` where they are not to."""
    if not stack_pass.kernels:
        return None
    try:
        return _runs_of_rows(stack_pass)
    except ConfigError:
        if stack_pass.impl != "auto":
            raise
        return None


def _runs_of_rows(stack_pass: StackPass) -> list[Documents]:
    """:func:`_all_runs`, or a :class:`ConfigError` if a graph's tensors cannot say which they are."""
    if stack_pass.tokens.packed:  # of which every batch has another number of documents
        raise ConfigError(
            "Triton's kernels take no packed rows in a compiled model (got impl='triton'); use impl='auto'"
        )
    sides = [side for side in (stack_pass.tokens, stack_pass.encoder_tokens) if side is not None]
    found = [stack_pass.runs(number) for number in range(len(sides))]
    if any(runs.positions > columns.document.shape[1] for runs, columns in zip(found, sides, strict=True)):
        raise ConfigError(
            "Triton's kernels take no later parts of documents in a compiled model (got impl='triton' and positions); use "
            "impl='auto'"
        )
    return found


def _flags(plan: StepPlan, runs: Documents, columns: int) -> Tensor | None:
    """Every mask of a plan by document and position, bool (heads of all entries * documents, columns)."""
    if not plan.entries:
        return None
    drawn = plan.all_to_torch(runs.table.device).values()
    return F.pad(torch.cat([keep.flatten(0, 2) for keep in drawn]), (0, columns - plan.columns))


def _first_heads(plan: StepPlan) -> dict[tuple[str, int], tuple[int, int]]:
    """(site, layer) -> where its heads begin among those of all entries, and how many they are."""
    found, first = {}, 0
    for entry in plan.entries:
        found[entry.site, entry.layer] = (first, entry.heads)
        first += entry.heads
    return found


def _keys(stack_pass: StackPass, slots: Slots, sites: list[Site]) -> tuple[Tensor, Tensor]:
    """Keys of all slots, int64 (slots, branches, 2) on the device, and their words, (slots, branches, 5) on the host."""
    branches = stack_pass.tokens.branch_order
    keys = np.zeros((len(slots), len(branches), 2), np.int64)
    words = np.zeros((len(slots), len(branches), 5), np.uint64)
    for site in sites:
        for depth in site.drops:
            slot = slots[site.kind, depth]
            for number, branch in enumerate(branches):
                key = MaskKey(stack_pass.seed, stack_pass.step, branch, depth, site.site)
                keys[slot, number], words[slot, number] = key.derive(), key.words
    device = stack_pass.tokens.document.device
    return to_device(torch.from_numpy(keys), device), torch.from_numpy(words.view(np.int64))


def _extent(rows: Tokens, columns: Tokens) -> Tensor:
    """What :func:`hiddenkey_rs.ops.element_pairs` asks for."""
    return torch.tensor([rows.columns, columns.columns, rows.aligned and columns.aligned])
