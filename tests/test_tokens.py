"""Where every token of a batch stands: padding sides, holes, packed documents, documents in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hiddenkey_rs import DataError
from hiddenkey_rs.attachment.tokens import check_positions, check_sample_ids, from_packed, from_rows


def test_rows_count_real_tokens_from_either_side_and_over_holes() -> None:
    real = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    tokens = from_rows(np.array([5, 6, 7, 8]), real, (0,))
    assert tokens.lengths.tolist() == [3, 2, 3, 0]
    assert tokens.position.tolist() == [[0, 1, 2, 0], [0, 0, 0, 1], [0, 0, 1, 2], [0, 0, 0, 0]]
    assert tokens.document.tolist() == [[n] * 4 for n in range(4)]
    assert (tokens.aligned, tokens.columns, tokens.packed) == (False, 3, False)
    assert from_rows(np.array([5]), real[:1], (0,)).aligned


def test_a_doubled_batch_repeats_the_ids_once_a_branch() -> None:
    real = torch.ones(4, 3, dtype=torch.bool)
    tokens = from_rows(np.array([5, 6]), real, (0, 1))
    assert tokens.samples.tolist() == [5, 6, 5, 6]
    assert tokens.branches.tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match=r"got 4 rows, 3 sample ids, 1 branch"):
        from_rows(np.array([1, 2, 3]), real, (0,))


def test_packed_rows_are_runs_of_ids() -> None:
    samples = np.array([[4, 4, 4, 9, 9, -1], [9, 2, 2, 2, -1, -1]])
    tokens = from_packed(samples, None, (0,), torch.device("cpu"))
    assert tokens.samples.tolist() == [4, 9, 9, 2]
    assert tokens.lengths.tolist() == [3, 2, 1, 3]
    assert tokens.document.tolist() == [[0, 0, 0, 1, 1, 0], [2, 3, 3, 3, 0, 0]]
    assert tokens.position.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 0]]
    assert tokens.real.tolist() == (samples >= 0).tolist()
    assert tokens.packed
    both = from_packed(samples, None, (0, 1), torch.device("cpu"))
    assert both.document[2:].tolist() == [[4, 4, 4, 5, 5, 0 + 4], [6, 7, 7, 7, 4, 4]]
    assert both.branches.tolist() == [0] * 4 + [1] * 4


def test_a_split_document_keeps_its_place() -> None:
    samples = np.array([[4, 4, 4, 4]])
    positions = np.array([[7, 8, 0, 1]])  # the end of one copy, then the start of another
    tokens = from_packed(samples, positions, (0,), torch.device("cpu"))
    assert tokens.samples.tolist() == [4, 4]
    assert tokens.position.tolist() == [[7, 8, 0, 1]]
    assert tokens.lengths.tolist() == [9, 2]


def test_positions_go_with_packed_ids() -> None:
    packed = check_sample_ids([[1, 1]])
    assert check_positions(None, packed) is None
    assert check_positions(torch.tensor([[0, 1]]), packed).tolist() == [[0, 1]]
    for positions, samples in (([0, 1], check_sample_ids([1, 1])), ([[0]], packed), ([[0.0, 1.0]], packed)):
        with pytest.raises(DataError, match="positions go with packed sample ids"):
            check_positions(positions, samples)


def test_rows_that_hold_one_document_on_average_are_packed() -> None:
    tokens = from_packed(np.array([[7, 7, 9, 9], [-1, -1, -1, -1]]), None, (0, 1), torch.device("cpu"))
    assert (tokens.crowded, tokens.packed) == (True, True)
    tokens = from_packed(np.array([[7, 7, -1], [9, 9, 9]]), None, (0,), torch.device("cpu"))
    assert (tokens.crowded, tokens.packed) == (False, False)
