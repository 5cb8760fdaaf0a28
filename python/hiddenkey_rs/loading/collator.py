"""Batches as dictionaries of tensors, gathered by the core from a store's flat arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batches.pad import IGNORED, Gathered, Gatherer, Layout, Room, Source, empty
from ..errors import ConfigError, DataError
from ..serialise import choice
from .buffers import Ring
from .features import LABELS, SAMPLE_ID, from_features
from .packed import PackedStore
from .planned import PlanSpec, check_split
from .rows import RowBatch

LAYOUTS = ("padded", "packed", "flat")
SAMPLE_POSITION = "sample_position"
"""The key of every token's place in its document, where the rows do not say it; see :class:`Collator`."""
PLAN = "mask_plan"
"""The key of a batch's :class:`StepPlan`, if the collator makes one."""


class Collator:
    """Rows of a store into the tensors of a batch: an ordinary ``collate_fn`` for ``torch.utils.data.DataLoader``.

    Args:
        pad_token_id: what stands at padding.
        padding_side: ``"right"`` or ``"left"``.
        pad_to_multiple_of: the width of the batch is rounded up to a multiple of it.
        max_length: more tokens of an example are cut off at its end. Default: nothing is cut.
        labels: ``"tokens"``: the ids themselves, -100 at padding. ``"column"``: the store's (a token column ``labels``, or
            a row column ``labels``, ``label`` or ``label_ids``). ``"auto"``: its column if there is one, else the tokens
            for the layouts of joined documents, else none. None: none.
        layout: ``"padded"``: one example a row. ``"packed"``: rows of a :class:`PackedStore`. ``"flat"``: all examples
            joined in a single row, without padding.
        position_ids: whether padded batches bring them (0 at padding). Joined documents always do.
        pin_memory, buffers: write into ``buffers`` page-locked buffers that take turns: the tensors of a batch are valid
            until ``buffers`` more batches were made. ``buffers=0``: new memory for each. Not in a loader's workers.
        plan: a :class:`PlanSpec`: the batch brings its :class:`StepPlan` under ``"mask_plan"``, for models of one's own.
            Attached models plan by themselves, and the Trainers leave it aside.
        vocabulary: how many ids the model knows; one beyond is an error. Ids below 0 always are.
        cu_seqlens: whether packed batches bring the boundaries of their documents. Flat ones always do.

    It is called with a :class:`RowBatch`, which is what a :class:`TokenStore` gives a loader for a list of rows; or with a
    list of examples as any other data set gives them (dictionaries with ``input_ids``), which are first made into flat
    arrays: that is where other collators spend their time, too.

    Returns of a batch of B rows of width L, all int64 where nothing else is said:
        ``input_ids`` (B, L).
        ``attention_mask`` (B, L), padded layout only: 1 at tokens.
        ``labels`` (B, L), -100 at padding and, where documents are joined, at each document's first token: the token
        before it belongs to another one. From a row column (B,): int64 with -100, or float32 with 0, for padding rows.
        ``token_type_ids`` (B, L), 0 at padding, if the store has them.
        ``position_ids`` (B, L), from 0 in each document. The padding at the end of a packed row is one more document.
        ``sample_id`` (B,), or (B, L) where documents are joined; -1 at padding. Left out for examples that bring none.
        ``sample_position`` (B, L), -1 at padding: every token's place in its whole document, where documents are split or
        two of one id stand side by side in a row. Elsewhere ``sample_id`` says as much. It goes to ``handle.step``.
        ``cu_seq_lens_q``, ``cu_seq_lens_k`` (documents + 1,) int32, ``max_length_q``, ``max_length_k`` (plain integers):
        where documents begin in the flattened rows, as FlashAttention takes them.
        ``mask_plan``: a :class:`StepPlan` of the batch's documents, in order.

    A padding row (row number -1, which a sampler gives to a rank that has nothing left) is one padding token with
    ``attention_mask`` 1, label -100 and sample id -1: it can be computed, and carries no weight.

    Raises:
        ConfigError: arguments out of range, unknown or contradicting each other or the store. DataError: rows, offsets,
            ids or columns that are wrong, each named.

    Example:
        >>> import hiddenkey_rs as hk
        >>> store = hk.TokenStore((np.array([5, 6, 7, 8, 9]), np.array([0, 3, 5])), row_columns={"labels": [1, 0]})
        >>> batch = hk.Collator()(store.__getitems__([1, 0]))
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["sample_id"].tolist()
        ([[8, 9, 0], [5, 6, 7]], [0, 1], [1, 0])
    """

    def __init__(
        self,
        *,
        pad_token_id: int = 0,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        labels: str | None = "auto",
        layout: str = "padded",
        position_ids: bool = False,
        pin_memory: bool = False,
        buffers: int = 0,
        plan: PlanSpec | None = None,
        vocabulary: int | None = None,
        cu_seqlens: bool = False,
    ) -> None:
        self.layout = choice(layout, LAYOUTS, "layout")
        self.labels = labels if labels is None else choice(labels, ("auto", "tokens", "column"), "labels")
        left = choice(padding_side, ("right", "left"), "padding_side") == "left"
        joined = self.layout != "padded"
        if joined and left:
            raise ConfigError(
                f"joined documents have no padding side (got 'left' with layout={layout!r}); leave padding_side out"
            )
        if self.layout == "packed" and (max_length is not None or pad_to_multiple_of is not None):
            raise ConfigError(
                "a packed row is as wide as its capacity (got max_length or pad_to_multiple_of); choose them when packing"
            )
        if plan is not None and not isinstance(plan, PlanSpec):
            raise ConfigError(f"plan must be a PlanSpec (got {type(plan).__name__}); see PlanSpec for what it needs")
        self.plan, self.cu_seqlens = plan, cu_seqlens or self.layout == "flat"
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        common = (pad_token_id, left, multiple, max_length, vocabulary, not joined, joined or bool(position_ids))
        self._layouts = (Layout(*common), Layout(*common, copy_labels=True))
        self.buffers = buffers
        self._ring = Ring(buffers, pin_memory) if buffers or pin_memory else None
        self._seen: tuple[Any, Gatherer, NDArray[Any] | None] | None = None

    def __call__(self, batch: RowBatch | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The tensors of a batch; see the class."""
        bare = not isinstance(batch, RowBatch)
        if not isinstance(batch, RowBatch):
            examples = from_features(batch)
            bare = examples.sample_ids is None
            batch = RowBatch(examples, np.arange(len(examples)))
        gatherer, row_labels = self._look(batch.store)
        found: dict[str, Any]
        if self._ring is None:
            gathered = self._lay(gatherer, batch, empty)
            # Each a tensor of its own: views of one would share the counter by which autograd knows of changes.
            found = dict(zip(gathered.names, map(torch.from_numpy, gathered.planes), strict=True))
        else:
            gathered, tensors = self._gather_into(self._ring, gatherer, batch)
            found = dict(zip(gathered.names, tensors, strict=True))
        if row_labels is not None:
            found["labels"] = _row_labels(row_labels, gathered.documents)
        if not bare:
            found[SAMPLE_ID] = torch.from_numpy(gathered.samples)
            places = None if self.layout == "padded" else gatherer.places(gathered)
            if places is not None:
                found[SAMPLE_POSITION] = torch.from_numpy(places)
        if self.cu_seqlens and gathered.boundaries is not None:
            found["cu_seq_lens_q"] = found["cu_seq_lens_k"] = torch.from_numpy(gathered.boundaries)
            found["max_length_q"] = found["max_length_k"] = gathered.longest
        if self.plan is not None:
            found[PLAN] = self.plan.plan(batch.epoch, batch.step, *gatherer.real_documents(gathered))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def _gather_into(self, ring: Ring, gatherer: Gatherer, batch: RowBatch) -> tuple[Gathered, Sequence[Tensor]]:
        held: list[Tensor] = []

        def room(shape: tuple[int, int, int]) -> NDArray[np.int64]:
            held.append(ring.take(shape[0] * shape[1] * shape[2]).view(shape))
            return held[0].numpy()

        # Views of one: page-locked memory knows by the tensor that it came from whether a copy is still under way.
        return self._lay(gatherer, batch, room), held[0].unbind(0)

    def _lay(self, gatherer: Gatherer, batch: RowBatch, room: Room) -> Gathered:
        if self.layout == "padded":
            return gatherer.pad(batch.rows, room)
        if self.layout == "flat":
            return gatherer.join(batch.rows, room)
        return gatherer.join_packed(batch.store.packing, batch.rows, room)

    def _look(self, store: Any) -> tuple[Gatherer, NDArray[Any] | None]:
        """What to gather of a store, and how: found out once, batches come from one store."""
        if self._seen is None or self._seen[0] is not store:
            packed = isinstance(store, PackedStore)
            if packed != (self.layout == "packed"):
                raise ConfigError(
                    f"the layout does not go with the store (got layout={self.layout!r} for a "
                    f"{'packed store' if packed else 'store that is not packed'}); use "
                    + ("layout='packed'" if packed else "store.packed(capacity), or another layout")
                )
            if packed and store.too_long == "split" and self.plan is not None:
                check_split(self.plan.config)
            self._seen = (store, *self._columns(store.store if packed else store))
        return self._seen[1:]

    def _columns(self, store: Any) -> tuple[Gatherer, NDArray[Any] | None]:
        per_token = store.token_columns.get("labels")
        per_row = next((store.row_columns[name] for name in LABELS if name in store.row_columns), None)
        if self.labels in (None, "tokens"):
            per_token = per_row = None
        elif per_token is not None:
            per_row = None
        joined = self.layout != "padded"
        if self.labels == "column" and per_token is None and per_row is None:
            raise DataError(f"the store has no labels (got columns {_names(store)}); name one 'labels'")
        if joined and per_row is not None:
            raise DataError(
                f"joined documents need one label a token (got one an example, layout={self.layout!r}); use "
                "layout='padded', or labels='tokens'"
            )
        copied = self.labels == "tokens" or (self.labels == "auto" and joined)
        types = store.token_columns.get("token_type_ids")
        source = Source(store.values, store.offsets, per_token, types, store.sample_ids)
        return Gatherer(source, self._layouts[copied]), per_row


def _names(store: Any) -> str:
    return ", ".join([*store.token_columns, *store.row_columns]) or "none"


def _row_labels(column: NDArray[Any], rows: NDArray[np.int64]) -> Tensor:
    labels = column[rows]
    if labels.dtype.kind == "f":
        labels, nothing = labels.astype(np.float32), 0.0
    else:
        labels, nothing = labels.astype(np.int64, copy=False), IGNORED
    labels[rows < 0] = nothing
    return torch.from_numpy(labels)
