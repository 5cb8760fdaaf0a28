"""HiddenCut and the residual add that follows, in Triton, against the add alone and ``F.dropout`` + add.

The goal is about the forward pass: an add's backward launches nothing, so that nothing whatever could keep pace with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..config import threshold
from ..masks import MaskKey
from ..ops import triton_hidden
from . import devices
from .harness import Case, Entrant, Goal, Pair
from .peers import at_rate

_RATE = 0.1
_THRESHOLD = threshold(_RATE)
_SCALE = 65536 / (65536 - _THRESHOLD)
_STEPS = 16
ADD, DROPOUT, OURS = "plain add", "F.dropout + add", "HiddenCut + add"


def dropped_add(hidden: Tensor, residual: Tensor, keys: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """``residual`` + HiddenCut of ``hidden`` in one kernel. Where the library's own call changes, this follows."""
    return triton_hidden.drop_elements(hidden, keys, samples, positions, _THRESHOLD, _SCALE, residual=residual)[0]


def cases(shape: tuple[int, int, int], dtype: torch.dtype, device: str, threads: int, goals: bool) -> Iterator[Case]:
    """``shape``: samples, length and features of the hidden states."""
    batch, length, width = shape
    hidden, residual = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    gradient = torch.randn(shape, device=device, dtype=dtype)
    sites = [torch.tensor([_key(step).derive()], device=device) for step in range(_STEPS)]
    samples = torch.arange(batch, device=device).repeat_interleave(length)
    positions = torch.arange(length, device=device).repeat(batch)

    def ours(step: int) -> Tensor:
        return dropped_add(hidden, residual, sites[step % _STEPS], samples, positions)

    def right() -> bool:
        keep = ops.row_keep(_key(0).derive(), samples, positions, width, _THRESHOLD).view(shape)
        kept = torch.where(keep, (hidden.float() * _SCALE).to(dtype), torch.zeros((), dtype=dtype, device=device))
        found, to_hidden, to_residual = _both(ours(0), hidden, residual, gradient)
        expected = torch.where(keep, (gradient.float() * _SCALE).to(dtype), torch.zeros((), dtype=dtype, device=device))
        close = torch.allclose(found.float(), (kept + residual).float(), rtol=2**-7, atol=1e-6)
        return close and torch.equal(to_hidden, expected) and torch.equal(to_residual, gradient)

    after = None if device == "cpu" else partial(devices.wait, device)

    def entrant(name: str, work: Callable[[int], object], check: Callable[[], bool]) -> Entrant:
        steps = itertools.count()
        return Entrant(name, lambda: work(next(steps)), check, after=after)

    def forward(work: Callable[[int], Tensor]) -> Callable[[int], object]:
        return torch.no_grad()(work)

    def both(work: Callable[[int], Tensor]) -> Callable[[int], object]:
        return lambda step: _both(work(step), hidden, residual, gradient)

    def dropout(step: int) -> Tensor:
        return residual + F.dropout(hidden, _RATE)

    def add(step: int) -> Tensor:
        return residual + hidden

    sizes = {"samples": batch, "length": length, "features": width, "dtype": str(dtype).removeprefix("torch.")}
    goal = Goal("speedup", 1 / 1.05) if goals else None
    for name, way, bound in (("forward", forward, goal), ("forward and backward", both, None)):
        entrants = [
            entrant(OURS, way(ours), right),
            entrant(ADD, way(add), lambda: torch.equal(residual + hidden, hidden + residual)),
            # Without the residual: in 16 bits a small number added to it leaves no trace.
            entrant(
                DROPOUT,
                way(dropout),
                lambda: at_rate(int(F.dropout(hidden, _RATE).count_nonzero()), hidden.numel()),
            ),
        ]
        case = f"HiddenCut + residual, {name}"
        pairs = [Pair(case, OURS, ADD, bound), Pair(case, OURS, DROPOUT)]
        yield Case("hidden", sizes, "ms", 1e3, threads, entrants, pairs)


def _key(step: int) -> MaskKey:
    return MaskKey(seed=11, step=step, layer=2, site="ffn")


def _both(output: Tensor, hidden: Tensor, residual: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    to_hidden, to_residual = torch.autograd.grad(output, (hidden, residual), gradient)
    return output.detach(), to_hidden, to_residual
