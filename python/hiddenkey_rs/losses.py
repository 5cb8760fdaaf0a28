"""Consistency between two passes of a model: the terms, which rows they see, and how they are reduced.

Everything runs in float32 from log-softmax, sums over classes (or vocabulary), and returns one number a row; the mean
is over examples, or over target tokens that carry loss. Nothing else keeps its meaning when batches are padded,
accumulated or spread over ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import DataError
from .serialise import choice

IGNORED = -100
"""The label of a token that carries no loss."""


def consistency(kind: str, first: Tensor, second: Tensor, *, gradient: str = "one") -> Tensor:
    """One number a row, (N,) float32, of a consistency term between (N, classes) logits (or values, for ``"mse"``).

    Args:
        kind: ``"kl"``, ``"js"``, ``"jensen-shannon"`` or ``"mse"``, as :class:`~hiddenkey_rs.Consistency` has them.
        first: the gradient pass. second: the other pass; for ``"js"`` the one without any dropout.
        gradient: ``"one"`` detaches ``second``; ``"both"`` does not.

    Raises:
        ConfigError: an unknown kind or gradient.
        DataError: rows of different shapes.

    Example:
        >>> consistency("kl", torch.zeros(2, 3), torch.zeros(2, 3))
        tensor([0., 0.])
    """
    choice(kind, _KINDS, "consistency kind")
    choice(gradient, ("one", "both"), "consistency gradient")
    if first.shape != second.shape:
        raise DataError(
            f"the two passes gave rows of different shapes (got {tuple(first.shape)} and {tuple(second.shape)}); "
            "both must see the same batch"
        )
    return _KINDS[kind](first, second.detach() if gradient == "one" or kind == "js" else second)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Bidirectional Kullback-Leibler divergence, 1/2 [KL(P1 || P2) + KL(P2 || P1)] (paper, eq. 11): (N, classes) twice -> (N,).

    Example:
        >>> kl(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])
    """
    a, b = _log_softmax(first), _log_softmax(second)
    # KL(P||Q) + KL(Q||P) = sum (p - q) (log p - log q)
    return 0.5 * ((a.exp() - b.exp()) * (a - b)).sum(dim=-1)


def js(first: Tensor, undropped: Tensor) -> Tensor:
    """The paper's ``js``: KL(P1 || P_bar), one-directional in spite of its name (eq. 12): (N, classes) twice -> (N,).

    ``undropped``: logits of a pass without any dropout.

    Example:
        >>> js(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.])
    """
    a, b = _log_softmax(first), _log_softmax(undropped)
    return (a.exp() * (a - b)).sum(dim=-1)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """The textbook Jensen-Shannon divergence, 1/2 KL(P1 || M) + 1/2 KL(P2 || M) with the mixture M, at most ln 2.

    Of logits (N, classes), twice: (N,) float32.

    Example:
        >>> jensen_shannon(torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]]))
        tensor([0.6931])
    """
    a, b = _log_softmax(first), _log_softmax(second)
    mixture = torch.logaddexp(a, b) - math.log(2)
    return 0.5 * (a.exp() * (a - mixture) + b.exp() * (b - mixture)).sum(dim=-1)


def mse(first: Tensor, second: Tensor) -> Tensor:
    """Squared difference of two outputs, (N, features) of any float dtype, mean over their features: (N,) float32.

    Example:
        >>> mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([5.])
    """
    return (first.float() - second.float()).square().mean(dim=-1)


_KINDS = {"kl": kl, "js": js, "jensen-shannon": jensen_shannon, "mse": mse}


def token_rows(logits: Tensor, labels: Tensor, *, shift: bool) -> Tensor:
    """The logits of the tokens that carry loss: (B, L, V) and labels (B, L) -> (N, V).

    ``labels``: int64, -100 where a token carries no loss. ``shift``: the logits of a position predict the label of the next one
    (causal language models).

    Raises:
        DataError: not one label a token.

    Example:
        >>> token_rows(torch.arange(3.0).view(1, 3, 1), torch.tensor([[7, -100, 9]]), shift=True)
        tensor([[1.]])
    """
    return labelled_rows(logits, labels, shift=shift)[0]


def labelled_rows(states: Tensor, labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """:func:`token_rows` of logits or hidden states, and the labels that they predict: (N, V) and (N,)."""
    return rows_at(labelled_places(labels, shift=shift), states, labels, shift=shift)


def labelled_places(labels: Tensor, *, shift: bool) -> Tensor:
    """Where labels (B, L) that carry loss are predicted: numbers of tokens, int64 (N,). An accelerator's host waits for it."""
    carries = labels != IGNORED
    if shift:  # the token before predicts it, in its own row
        carries = F.pad(carries[:, 1:], (0, 1))
    return carries.flatten().nonzero().flatten()


def rows_at(places: Tensor, states: Tensor, labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """States (B, L, D) at :func:`labelled_places`, (N, D), and the labels that they predict, (N,)."""
    if states.shape[:2] != labels.shape:
        raise DataError(
            f"there must be one label a token (got labels {tuple(labels.shape)} for {tuple(states.shape[:2])} tokens); pad both "
            "alike"
        )
    return states.flatten(0, 1).index_select(0, places), labels.flatten().index_select(0, places + int(shift))


def reduce(per_row: Tensor, normaliser: Tensor | float | None = None) -> Tensor:
    """Sum of (N,) numbers / ``normaliser`` (default: N), a 0-dim tensor. No rows give exactly 0, and gradients of 0.

    Example:
        >>> reduce(torch.tensor([1.0, 3.0])), reduce(torch.tensor([1.0, 3.0]), 8)
        (tensor(2.), tensor(0.5000))
    """
    total = per_row.sum()
    return total / (max(per_row.numel(), 1) if normaliser is None else normaliser)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), dim=-1)
