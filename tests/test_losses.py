"""Consistency terms: values by hand, gradients of one branch and both, reductions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hiddenkey_rs import DataError, losses

P, Q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])


def test_values_by_hand() -> None:
    a, b = P.log(), Q.log() + 3.0  # a constant shift of logits changes nothing
    # KL(P||Q) = .5 ln 2 - .25 ln 2 = .25 ln 2, and the same the other way round
    assert losses.kl(a, b).item() == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert losses.js(a, b).item() == pytest.approx(0.25 * math.log(2), rel=1e-5)
    m = (P + Q) / 2
    expected = 0.5 * (P * (P / m).log() + Q * (Q / m).log()).sum().item()
    assert losses.jensen_shannon(a, b).item() == pytest.approx(expected, rel=1e-5)
    assert losses.mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])).item() == 2.5


def test_js_is_one_directional_and_kl_is_not() -> None:
    a, b = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert losses.js(a, b) != losses.js(b, a)
    torch.testing.assert_close(losses.kl(a, b), 0.5 * (losses.js(a, b) + losses.js(b, a)))


@pytest.mark.parametrize("kind", ["kl", "js", "jensen-shannon", "mse"])
def test_gradient_branches(kind: str) -> None:
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    one = losses.consistency(kind, a, b, gradient="one")
    assert one.shape == (4,)
    assert torch.autograd.grad(one.sum(), b, allow_unused=True, retain_graph=True)[0] is None
    (grad,) = torch.autograd.grad(one.sum(), a)
    assert grad.abs().sum() > 0
    second = torch.autograd.grad(losses.consistency(kind, a, b, gradient="both").sum(), b, allow_unused=True)[0]
    assert (second is None) == (kind == "js"), "the undropped pass never carries gradient"


@given(st.integers(1, 5), st.integers(2, 7), st.integers(0, 1000))
def test_divergences_are_never_negative_and_zero_on_equals(rows: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = 5 * torch.randn(2, rows, classes, generator=generator)
    for kind in ("kl", "js", "jensen-shannon"):
        assert (losses.consistency(kind, a, b) > -1e-6).all()
        assert losses.consistency(kind, a, a + 2.0).abs().max() < 1e-5
    assert losses.jensen_shannon(a, b).max() <= math.log(2) + 1e-6


def test_half_precision_logits_are_compared_in_float32() -> None:
    a, b = torch.randn(3, 1000), torch.randn(3, 1000)
    assert losses.kl(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    extreme = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert torch.isfinite(losses.kl(*extreme)).all()


def test_token_rows_are_those_that_carry_loss() -> None:
    logits = torch.arange(2 * 4 * 3).reshape(2, 4, 3).float()
    labels = torch.tensor([[-100, 5, -100, 6], [7, -100, -100, -100]])
    assert losses.token_rows(logits, labels, shift=False).tolist() == [
        logits[0, 1].tolist(),
        logits[0, 3].tolist(),
        logits[1, 0].tolist(),
    ]
    assert losses.token_rows(logits, labels, shift=True).tolist() == [logits[0, 0].tolist(), logits[0, 2].tolist()]


def test_reduction() -> None:
    rows = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert losses.reduce(rows).item() == 3.0
    assert losses.reduce(rows, 12).item() == 0.75
    empty = losses.reduce(rows[:0])
    assert empty.item() == 0.0
    empty.backward()
    assert rows.grad.tolist() == [0.0, 0.0, 0.0]


def test_passes_of_different_shapes() -> None:
    with pytest.raises(DataError, match=r"got \(2, 3\) and \(3, 3\)"):
        losses.consistency("kl", torch.zeros(2, 3), torch.zeros(3, 3))
