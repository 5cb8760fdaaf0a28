"""Which example, and which position in it, every token of a padded or packed batch belongs to.

Masks are drawn in the examples' own coordinates (positions count from the first real token) and then laid over
the batch, so that padding side, padding width, batch composition and packing cannot change them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError
from ..transfer import to_device


@dataclass(frozen=True, eq=False)
class Tokens:
    """The documents of a batch and the place of every token.

    ``samples``, ``branches``, ``lengths``: (documents,) int64, one entry a document, ordered by branch.
    ``document``, ``position``: (batch, length) int64, zero at padding. ``real``: (batch, length) bool.
    ``aligned``: row b holds document b alone and its position j stands in column j (right padding).
    """

    samples: np.ndarray
    branches: np.ndarray
    lengths: np.ndarray
    document: Tensor
    position: Tensor
    real: Tensor
    real_count: int
    """How many tokens are no padding."""
    aligned: bool
    told: bool = False
    """As :attr:`RowFacts.told`."""
    crowded: bool = False
    """Whether some row holds several documents."""
    packed: bool = False
    """Whether some row may hold several documents, or none."""

    @cached_property
    def branch_order(self) -> tuple[int, ...]:
        """The branches that the rows belong to, in equal parts one behind the other."""
        return tuple(dict.fromkeys(self.branches.tolist()))

    @cached_property
    def row_samples(self) -> Tensor:
        """Every token's example, int64 (batch * length,); -1 at padding."""
        if not len(self.samples):
            return self.document.new_full((self.document.numel(),), -1)
        return self.sample_ids[self.document].masked_fill(~self.real, -1).flatten()

    @cached_property
    def row_positions(self) -> Tensor:
        """Every token's place in its example, int64 (batch * length,)."""
        return self.position.flatten().contiguous()

    @cached_property
    def sample_ids(self) -> Tensor:
        """``samples`` on the batch's device."""
        return to_device(torch.from_numpy(self.samples), self.document.device)

    @cached_property
    def real_lengths(self) -> Tensor:
        """``lengths`` on the batch's device."""
        return to_device(torch.from_numpy(self.lengths), self.document.device)

    def lay(self, drawn: Tensor) -> Tensor:
        """One flag a position of each document, bool (documents, heads, columns), over the batch: (batch, heads, length).

        Padding is False.
        """
        if self.aligned:
            return F.pad(drawn, (0, self.document.shape[1] - drawn.shape[2]))
        if not drawn.shape[0] or not drawn.shape[2]:
            return drawn.new_zeros(self.document.shape[0], drawn.shape[1], self.document.shape[1])
        return (drawn[self.document, :, self.position] & self.real[..., None]).transpose(1, 2)

    @property
    def columns(self) -> int:
        """The number of positions a mask must cover: the longest document's."""
        return int(self.lengths.max(initial=0))


@dataclass(frozen=True, eq=False)
class RowFacts:
    """What rows of one document each are like, and what of it a host must know: an accelerator is asked for that once."""

    real: Tensor
    position: Tensor
    lengths: np.ndarray
    aligned: bool
    told: bool = False
    """Whether a mask of (B, L) said so: a larger one may forbid more than padding, and then lengths do not say what is seen."""

    @staticmethod
    def whole(rows: int, length: int, device: torch.device) -> RowFacts:
        """Of rows without padding, which nobody need be asked about."""
        real = torch.ones(rows, length, dtype=torch.bool, device=device)
        position = torch.arange(length, device=device).expand(rows, length)
        return RowFacts(real, position, np.full(rows, length, dtype=np.int64), aligned=True)

    @staticmethod
    def of(real: Tensor, told: bool = False) -> RowFacts:
        """``real``: bool (B, L), False at padding."""
        counts = real.sum(dim=1)
        columns = torch.arange(real.shape[1], device=real.device)
        left = (real == (columns < counts[:, None])).all()
        *lengths, aligned = torch.cat((counts, left[None])).tolist()
        counted = (torch.cumsum(real, dim=1) - 1).clamp_(min=0) if not aligned else columns
        position = counted * real
        return RowFacts(real, position, np.array(lengths, dtype=np.int64), bool(aligned), told)


def from_rows(samples: np.ndarray, real: Tensor | RowFacts, branches: tuple[int, ...]) -> Tokens:
    """One document a row. ``samples`` (B,), ``real`` (B * len(branches), L): the rows repeat once a branch."""
    facts = real if isinstance(real, RowFacts) else RowFacts.of(real)
    real = facts.real
    rows = real.shape[0]
    if rows != len(samples) * len(branches):
        raise DataError(
            f"the batch has another number of rows than there are sample ids (got {rows} rows, {len(samples)} sample "
            f"ids, {len(branches)} branch(es)); give handle.step one sample id for every row"
        )
    return Tokens(
        samples=np.tile(samples, len(branches)),
        branches=np.repeat(np.asarray(branches, dtype=np.int64), len(samples)),
        lengths=facts.lengths,
        document=torch.arange(rows, device=real.device)[:, None].expand_as(real),
        position=facts.position,
        real=real,
        real_count=int(facts.lengths.sum()),
        aligned=facts.aligned,
        told=facts.told,
    )


def from_packed(
    samples: np.ndarray, positions: np.ndarray | None, branches: tuple[int, ...], device: torch.device
) -> Tokens:
    """Several documents a row. ``samples`` (B, L) with -1 for padding; ``positions`` (B, L) or ``None``.

    Without positions a document is a run of equal ids in a row and its positions count from the run's start; a
    document that was split keeps its place only if the caller says so through ``positions``.
    """
    real = samples >= 0
    starts = real.copy()
    starts[:, 1:] &= samples[:, 1:] != samples[:, :-1]
    if positions is not None:
        # A new document of the same id begins where the positions do not go on counting.
        starts[:, 1:] |= real[:, 1:] & (positions[:, 1:] != positions[:, :-1] + 1)
    document = np.where(real, np.cumsum(starts.ravel()).reshape(starts.shape) - 1, 0)
    offsets = np.where(real, _run_positions(starts), 0) if positions is None else np.where(real, positions, 0)
    identifiers = samples[starts]
    lengths = np.zeros(len(identifiers), dtype=np.int64)
    np.maximum.at(lengths, document[real], offsets[real] + 1)
    held, copies = starts.sum(axis=1), len(branches)
    shift = np.repeat(np.arange(copies) * len(identifiers), len(samples))[:, None]
    return Tokens(
        samples=np.tile(identifiers, copies),
        branches=np.repeat(np.asarray(branches, dtype=np.int64), len(identifiers)),
        lengths=np.tile(lengths, copies),
        document=to_device(torch.from_numpy(np.tile(document, (copies, 1)) + shift), device),
        position=to_device(torch.from_numpy(np.tile(offsets, (copies, 1))), device),
        real=to_device(torch.from_numpy(np.tile(real, (copies, 1))), device),
        real_count=copies * int(real.sum()),
        aligned=False,
        crowded=bool((held > 1).any()),
        packed=bool((held != 1).any()),
    )


def _run_positions(starts: np.ndarray) -> np.ndarray:
    columns = np.broadcast_to(np.arange(starts.shape[1]), starts.shape)
    return columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)


def check_sample_ids(sample_ids: object, name: str = "sample ids") -> np.ndarray:
    """``sample_ids`` as int64, (B,) or (B, L); a :class:`DataError` for anything that is no table of integers."""
    if sample_ids is None:
        raise DataError(
            f"{name} are missing (got None); pass the examples' ids in the data set, one for every row of the batch"
        )
    try:
        array = sample_ids.detach().cpu().numpy() if isinstance(sample_ids, Tensor) else np.asarray(sample_ids)
    except (TypeError, ValueError) as error:  # rows of unequal length, bfloat16
        raise DataError(
            f"{name} must be integers of shape (batch,) or (batch, length) (got {type(sample_ids).__name__}: {error}); pass "
            "the row numbers of the examples in the data set"
        ) from None
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise DataError(
            f"{name} must be integers of shape (batch,) or (batch, length) (got {array.dtype} of shape "
            f"{array.shape}); pass the row numbers of the examples in the data set"
        )
    # A row of padding stands alone: where a step has fewer rows than there are ranks and micro-batches.
    lowest = 0 if array.ndim == 1 and array.size > 1 else -1
    if array.size and (array.min() < lowest or array.max() >= 1 << 40):
        value = int(array.min() if array.min() < lowest else array.max())
        raise DataError(
            f"{name} must lie in [0, 2**40), with -1 for padding in packed rows and for a padding row alone (got {value}); "
            "number the examples from 0"
        )
    return array.astype(np.int64)


def check_positions(positions: Any, samples: np.ndarray) -> np.ndarray | None:
    """``positions`` as int64 (B, L) beside packed sample ids, or ``None``."""
    if positions is None:
        return None
    array = np.asarray(positions.detach().cpu() if isinstance(positions, Tensor) else positions)
    if array.shape != samples.shape or samples.ndim != 2 or array.dtype.kind not in "iu":
        raise DataError(
            f"positions go with packed sample ids, one integer a token (got {array.dtype} of shape {array.shape} for "
            f"sample ids of shape {samples.shape}); leave them out for unpacked rows"
        )
    return array.astype(np.int64)
