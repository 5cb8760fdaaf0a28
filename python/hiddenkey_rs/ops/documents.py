"""A batch as runs of tokens: what the Triton kernels walk over instead of (queries, keys) masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..transfer import to_device

_TILE = 128
MOST_POSITIONS = 1 << 20


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch, each a contiguous run of tokens of one row (or, for cross-attention, a run on each side).

    A document attends to itself only. Tokens of no document, padding on whichever side, are never read and cost
    nothing; as queries they get zeros. No token may belong to two documents.

    ``table``: int64 (documents, 8) on the batch's device, ordered by branch: row, first query and number of queries,
    first key and number of keys (indices into the row), sample id, positions of the first query and of the first key
    in the example (0, unless a document was split). Without a token: counts of 0.
    ``queries``, ``keys``: the most a document has. ``positions``: one more than the highest key position.
    ``shifted``: whether some document's first key stands inside a tile of 128 positions.
    ``full``: whether every token is one of a document's, so that kernels write all there is of their results.
    ``cross``: cross-attention, where a query that lost all its keys keeps all of them instead of its own.
    """

    table: Tensor
    queries: int
    keys: int
    positions: int
    shifted: bool = False
    cross: bool = False
    full: bool = False

    @staticmethod
    def of_tokens(samples: Any, document: Tensor, position: Tensor, real: Tensor) -> Documents:
        """Self-attention over a padded or packed batch. Waits for the device once: build it once a pass, not a layer.

        Args:
            samples: (documents,) int64 array or tensor, ordered by branch.
            document, position: (B, L) int64, every token's document and its place in it. real: bool (B, L).

        Raises:
            ConfigError: a document that is no contiguous run of one row, with positions that count on; a position out of
                range.

        Example:
            >>> real = torch.tensor([[False, True, True], [True, True, False]])
            >>> documents = Documents.of_tokens([7, 9], torch.tensor([[0] * 3, [1] * 3]), real.cumsum(1) - 1, real)
            >>> documents.table.tolist()
            [[0, 1, 2, 1, 2, 7, 0, 0], [1, 0, 2, 0, 2, 9, 0, 0]]
        """
        samples = torch.as_tensor(samples, dtype=torch.int64, device=real.device)
        many, length = len(samples), real.shape[1]
        if not many or not real.numel():
            return Documents(torch.zeros(many, 8, dtype=torch.int64, device=real.device), 0, 0, 0)
        place = torch.arange(real.numel(), device=real.device)
        # Padding goes to a bucket behind the documents.
        bucket = document.masked_fill(~real, many).flatten()
        spot = place.new_zeros(many + 1)
        low = spot.scatter_reduce(0, bucket, place, "amin", include_self=False)[:many]
        high = spot.scatter_reduce(0, bucket, place, "amax", include_self=False)[:many]
        count = spot.scatter_add(0, bucket, torch.ones_like(place))[:many]
        flat = position.flatten()
        first = flat[low].masked_fill(count == 0, 0)
        fits = (high - low + 1 == count) & (low // length == high // length)
        steady = (place - flat == functional.pad(low - first, (0, 1))[bucket]) | (bucket == many)
        good = (fits | (count == 0)).all() & (first >= 0).all() & steady.all()
        facts = torch.stack((good.long(), count.max(), (first + count).max(), (first % _TILE).max(), count.sum()))
        correct, most, positions, inside, every = facts.tolist()
        if not correct:
            raise ConfigError(
                "a document's tokens must stand side by side in one row, with positions that count on (got a batch with "
                "gaps); use masks of (query, key) pairs"
            )
        _check_positions(positions)
        start = (low % length).masked_fill(count == 0, 0)
        table = torch.stack((low // length, start, count, start, count, samples, first, first), dim=1)
        return Documents(table, most, most, positions, shifted=inside > 0, full=every == real.numel())

    @staticmethod
    def of_rows(samples: Any, lengths: Any, length: int, device: torch.device | str = "cpu") -> Documents:
        """Self-attention over one document a row, each from the row's start on: what the host knows, and no device is asked.

        Args:
            samples, lengths: (B,) integers on the host. length: of the rows. device: of the batch.

        Example:
            >>> Documents.of_rows([7, 9], [2, 3], 3).table.tolist()
            [[0, 0, 2, 0, 2, 7, 0, 0], [1, 0, 3, 0, 3, 9, 0, 0]]
        """
        count = np.asarray(lengths, np.int64)
        table = np.zeros((len(count), 8), np.int64)
        table[:, 0], table[:, 5] = np.arange(len(count)), samples
        table[:, 2] = table[:, 4] = count
        most = int(count.max(initial=0))
        _check_positions(most)
        full = int(count.sum()) == len(count) * length
        return Documents(to_device(torch.from_numpy(table), torch.device(device)), most, most, most, full=full)

    @staticmethod
    def across(queries: Documents, keys: Documents) -> Documents:
        """Cross-attention: document i of the decoder's batch reads document i of the encoder's.

        Raises:
            ConfigError: batches whose documents do not stand in the same rows.

        Example:
            >>> real = torch.ones(1, 3, dtype=torch.bool)
            >>> place = real.long().cumsum(1) - 1
            >>> side = [Documents.of_tokens([7], 0 * place[:, :n], place[:, :n], real[:, :n]) for n in (2, 3)]
            >>> Documents.across(*side).table.tolist()
            [[0, 0, 2, 0, 3, 7, 0, 0]]
        """
        ours, theirs = queries.table, keys.table
        if ours.shape != theirs.shape or ours.device != theirs.device or not torch.equal(ours[:, 0], theirs[:, 0]):
            raise ConfigError(
                f"decoder and encoder documents do not pair up (got {len(ours)} and {len(theirs)}); keep one document a "
                "row on both sides"
            )
        table = torch.cat((ours[:, :3], theirs[:, 1:3], ours[:, 5:7], theirs[:, 6:7]), dim=1)
        full = queries.full and keys.full
        return Documents(table, queries.queries, keys.keys, keys.positions, keys.shifted, cross=True, full=full)


def _check_positions(positions: int) -> None:
    if positions > MOST_POSITIONS:
        raise ConfigError(f"positions must lie below 2**20 (got {positions - 1}); split the document")
