"""Dropout on hidden states, and the attention-guided span."""

from __future__ import annotations

import torch

from hiddenkey_rs import masks, ops
from hiddenkey_rs.config import threshold


def test_inverted_dropout_keeps_the_expectation() -> None:
    """E[mask * scale] = 1 in closed form: the scale uses the rate that the threshold realises."""
    for rate in (0.01, 0.1, 0.15, 0.3, 0.9):
        p = threshold(rate) / 65536
        assert abs((1 - p) * (1 / (1 - p)) - 1) <= 2**-24
        assert masks.realised(rate) == p


def test_dropped_places_are_gone() -> None:
    hidden = torch.tensor([[[1.0, float("inf"), float("nan"), -2.0]]], requires_grad=True)
    keep = torch.tensor([[[True, False, False, True]]])
    output = ops.drop_hidden(hidden, keep, 2.0)
    assert output.tolist() == [[[2.0, 0.0, 0.0, -4.0]]]
    output.sum().backward()
    assert hidden.grad.tolist() == [[[2.0, 0.0, 0.0, 2.0]]]
    token = ops.drop_hidden(torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.tensor([[[True], [False]]]))
    assert token.dtype == torch.bfloat16
    assert token.tolist() == [[[1.0] * 3, [0.0] * 3]]


def test_guided_spans_start_at_much_attended_tokens_and_fit() -> None:
    length = 10
    received = torch.tensor([[0.1, 9.0, 0.2, 8.0, 0.3, 0.4, 7.0, 0.5, 0.6, 6.0, -1.0, -1.0]])
    real = torch.arange(12)[None] < length
    t = threshold(0.2)  # two tokens
    starts = set()
    for draw in range(0, 1 << 32, 1 << 28):
        keep = ops.guided_span(received, real, torch.tensor([length]), torch.tensor([draw]), t)
        dropped = (~keep & real)[0].nonzero().flatten().tolist()
        assert len(dropped) == 2
        assert dropped[1] == dropped[0] + 1
        assert not keep[0, length:].any()
        starts.add(dropped[0])
    # floor(.4 * 10) = 4 candidates: 1, 3, 6, and 9, which is moved back so that the block fits
    assert starts == {1, 3, 6, 8}


def test_guided_spans_with_left_padding() -> None:
    received = torch.tensor([[-1.0, -1.0, 5.0, 1.0, 1.0]])
    real = torch.tensor([[False, False, True, True, True]])
    keep = ops.guided_span(received, real, torch.tensor([3]), torch.tensor([0]), threshold(0.3))
    assert keep.tolist() == [[False, False, False, True, True]]
