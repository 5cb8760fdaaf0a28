"""Both terms of some tokens' logits together with their gradients, in closed form.

Autograd gets there by two to three times as many passes over tensors of the vocabulary's size, which is what a vocabulary
head's losses cost. :mod:`..losses` defines the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def both_terms(
    first: Tensor,
    second: Tensor | None,
    labels: Tensor,
    kind: str | None,
    *,
    both: bool,
    scales: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Both terms, each a sum over tokens, float32 (), and the loss' gradients.

    The loss is task * scales[0] + consistency * scales[1]; its gradients are with respect to ``first`` and, if ``both``,
    to ``second``.

    Args:
        first, second: float32 (N, vocabulary), logits of the two passes; without a second one there is no consistency.
        labels: (N,). kind: ``"kl"``, ``"js"`` or ``"jensen-shannon"``, or ``None`` as without a second pass.
        both: the task loss is of both passes, and gradients go through both; else ``second`` is a constant.
        scales: float32 (); ``None``: no gradients are made.

    Example:
        >>> z, one = torch.tensor([[0.0, 0.0]]), torch.ones(())
        >>> both_terms(z, None, torch.tensor([0]), None, both=False, scales=(one, one))[2]
        [tensor([[-0.5000,  0.5000]])]
    """
    log_p = F.log_softmax(first.detach(), dim=-1)
    task = _cross_entropy(log_p, labels)
    if second is None or kind is None:
        found = [] if scales is None else [_less_labels(log_p.exp_().mul_(scales[0]), labels, scales[0])]
        return task, task.new_zeros(()), found
    p = log_p.exp()
    log_q, q = _other(second)
    if both:
        task = task + _cross_entropy(log_q, labels)
    values, slope = _term(kind, log_p, log_q, p, q)
    factor = _KINDS[kind][1]
    consistency = values.sum() * factor
    if scales is None:
        return task, consistency, []
    found = [_joined(slope, p, labels, scales, factor)]
    if both:  # terms that have two gradients are symmetric
        found.append(_joined(_term(kind, log_q, log_p, q, p)[1], q, labels, scales, factor))
    return task, consistency, found


def _cross_entropy(log_p: Tensor, labels: Tensor) -> Tensor:
    return -log_p.gather(1, labels[:, None]).sum()


def _other(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The other pass's log-probabilities and probabilities."""
    log_q = F.log_softmax(logits.detach(), dim=-1)
    return log_q, log_q.exp()


def _joined(slope: Tensor, p: Tensor, labels: Tensor, scales: tuple[Tensor, Tensor], factor: float) -> Tensor:
    return _less_labels(slope.mul_(scales[1] * factor).addcmul_(p, scales[0]), labels, scales[0])


def _less_labels(gradient: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy's gradient is p less 1 at the label."""
    return gradient.scatter_add_(1, labels[:, None], -scale.expand(len(labels), 1))


_Term = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of log p, log q, p and q: the term of each token, (N,), and its gradient with respect to p's logits; both less a factor."""


def _kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    ratio, difference = log_p - log_q, p - q
    values = (difference * ratio).sum(dim=-1)
    return values, _centred(ratio, p).add_(difference)


def _js(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    ratio = log_p - log_q
    return (p * ratio).sum(dim=-1), _centred(ratio, p)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    mixture = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    ratio = log_p - mixture
    values = (p * ratio).add_(q * (log_q - mixture)).sum(dim=-1)
    return values, _centred(ratio, p)


def _centred(ratio: Tensor, p: Tensor) -> Tensor:
    """What a sum of p times ``ratio`` makes of the logits, ``ratio`` held constant: p (ratio - sum of p ratio)."""
    return ratio.sub_((p * ratio).sum(dim=-1, keepdim=True)).mul_(p)


_KINDS: dict[str, tuple[_Term, float]] = {"kl": (_kl, 0.5), "js": (_js, 1.0), "jensen-shannon": (_jensen_shannon, 0.5)}
"""Terms and their factors."""


def _term(kind: str, *both: Tensor) -> tuple[Tensor, Tensor]:
    return _KINDS[kind][0](*both)
