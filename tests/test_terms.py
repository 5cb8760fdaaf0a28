"""Both terms of logits in closed form: values and gradients are those of autograd on their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hiddenkey_rs import losses
from hiddenkey_rs.attachment.terms import both_terms

KINDS = [(None, False), ("kl", False), ("kl", True), ("js", False), ("jensen-shannon", False), ("jensen-shannon", True)]


@settings(max_examples=60, deadline=None)
@given(
    which=st.sampled_from(KINDS),
    tokens=st.integers(0, 5),
    classes=st.integers(1, 40),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    apart=st.sampled_from([0.0, 1e-3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equal_autograd_on_the_definitions(which, tokens, classes, spread, apart, seed) -> None:
    kind, both = which
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(tokens, classes, generator=generator) * spread
    second = first + torch.randn(tokens, classes, generator=generator) * apart
    labels = torch.randint(classes, (tokens,), generator=generator)
    scales = torch.tensor(0.3), torch.tensor(0.7)
    wide = [first.double().requires_grad_(), second.double().requires_grad_()]
    # The definitions go through float32: their own error is what is allowed.
    task = F.cross_entropy(wide[0], labels, reduction="sum")
    if both:
        task = task + F.cross_entropy(wide[1], labels, reduction="sum")
    term = torch.zeros(())
    if kind is not None:
        term = losses.consistency(kind, *wide, gradient="both" if both else "one").sum()
    expected = torch.autograd.grad(task * scales[0] + term * scales[1], wide[: 1 + both], allow_unused=True)
    other = second if kind is not None else None
    found_task, found_term, gradients = both_terms(first, other, labels, kind, both=both, scales=scales)
    torch.testing.assert_close(found_task.double(), task.detach(), rtol=1e-5, atol=1e-5 * spread)
    torch.testing.assert_close(found_term, term.detach().float(), rtol=1e-5, atol=1e-5 * spread)
    assert len(gradients) == 1 + both
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * spread)
    again = both_terms(first, other, labels, kind, both=both, scales=None)
    assert torch.equal(again[0], found_task)
    assert torch.equal(again[1], found_term)
    assert not again[2]


@pytest.mark.parametrize(("kind", "both"), KINDS)
def test_what_it_is_given_stays(kind: str | None, both: bool) -> None:
    first, second = torch.randn(4, 9), torch.randn(4, 9)
    before = first.clone(), second.clone()
    ones = torch.ones(()), torch.ones(())
    both_terms(first, second if kind else None, torch.arange(4), kind, both=both, scales=ones)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    assert ones[0] == ones[1] == 1
