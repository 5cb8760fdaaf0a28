"""Inverted dropout applied to hidden states, forward and backward, against a plain copy and against ``F.dropout``.

An operator returns new memory, and for tensors of this size the C library asks the system for it each time, which takes
several times as long as the dropout. So freed memory is handed out again while these cases run, for ours and for torch
alike (:func:`~hiddenkey_rs.benchmarks.machine.recycled_memory`); the cases "stock malloc" show what it is without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import masks, ops
from ..masks import MaskKey
from .harness import Case, Entrant, Goal, Pair
from .machine import recycled_memory
from .peers import RATE, THRESHOLD, at_rate

_SCALE = 65536 / (65536 - THRESHOLD)
_KEY = MaskKey(seed=11, step=3, layer=2, site="ffn")
_GOAL_SHAPE = (32, 512, 1024)
_COPY, _CLONE, _DROPOUT = "out.copy_(x)", "x.clone()", "F.dropout"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class _Work:
    """One dtype's tensors: hidden states, where their rows stand, the element and column masks, room for results."""

    hidden: Tensor
    keys: Tensor
    samples: Tensor
    positions: Tensor
    keep: Tensor
    rows: Tensor
    out: Tensor

    @classmethod
    def make(cls, shape: tuple[int, int, int], dtype: torch.dtype) -> _Work:
        batch, length, width = shape
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        samples, positions = torch.arange(batch).repeat_interleave(length), torch.arange(length).repeat(batch)
        keep = torch.from_numpy(masks.element_bool(_KEY, np.arange(batch), length, width, RATE)).view(shape)
        rows = torch.from_numpy(masks.column(_KEY, np.arange(batch), length, RATE).to_bool()).reshape(-1)
        return cls(hidden, torch.tensor([_KEY.derive()]), samples, positions, keep, rows, torch.empty_like(hidden))

    def dropped(self, source: Tensor, keep: Tensor) -> Tensor:
        """What is right: the product in float32, rounded to the dtype, and zero where dropped."""
        return torch.where(keep, (source.float() * _SCALE).to(source.dtype), torch.zeros((), dtype=source.dtype))

    def operator(self) -> Entrant:
        """Ours, forward."""

        def call() -> Tensor:
            return ops.drop_elements(self.hidden, self.keys, self.samples, self.positions, THRESHOLD, _SCALE)[0]

        return Entrant("operator", call, self.right(call, self.keep))

    def right(self, call: Callable[[], Tensor], keep: Tensor) -> Callable[[], bool]:
        """A check of what ``call`` makes of the hidden states."""
        return lambda: self.drawn_right() and torch.equal(call(), self.dropped(self.hidden, keep))

    def drawn_right(self) -> bool:
        """Whether the mask that results are compared with is the torch generator's, on 64 rows."""
        chosen = torch.linspace(0, len(self.samples) - 1, 64).long()
        rows = ops.row_keep(
            _KEY.derive(), self.samples[chosen], self.positions[chosen], self.hidden.shape[-1], THRESHOLD
        )
        return torch.equal(rows, self.keep.view(-1, self.hidden.shape[-1])[chosen])


def cases(shape: tuple[int, int, int], threads: Sequence[int]) -> Iterator[Case]:
    """Hidden states of ``shape`` (samples, length, features)."""
    goals = shape == _GOAL_SHAPE
    for name, dtype in _DTYPES.items():
        yield _fresh(name, _Work.make(shape, dtype))
    with recycled_memory():
        for name, dtype in _DTYPES.items():
            for count in threads:
                yield _forward(name, _Work.make(shape, dtype), count, goals)
                yield _backward(name, _Work.make(shape, dtype), count, goals)


def _fresh(name: str, work: _Work) -> Case:
    """Results in memory that the system has to give first, where they are large."""
    pairs = [Pair(f"dropout {name}, forward, stock malloc", "operator", peer) for peer in (_CLONE, _DROPOUT)]
    return _case(work, 1, [work.operator(), _copies(work.hidden, work.out)[1], _dropout(work.hidden)], pairs)


def _forward(name: str, work: _Work, threads: int, goals: bool) -> Case:
    hidden, out = work.hidden, work.out
    bits = torch.uint16 if hidden.dtype is torch.bfloat16 else torch.float32
    flat_in, flat_out = (tensor.view(bits).view(-1, hidden.shape[-1]).numpy() for tensor in (hidden, out))
    samples, positions, site = work.samples.numpy(), work.positions.numpy(), _KEY.derive()

    def into() -> Tensor:
        masks.drop_elements(site, samples, positions, THRESHOLD, _SCALE, flat_in, flat_out)
        return out

    def tokens() -> Tensor:
        return ops.drop_rows(hidden, work.rows, _SCALE)

    entrants = [
        work.operator(),
        Entrant("into given memory", into, work.right(into, work.keep)),
        Entrant("tokens", tokens, work.right(tokens, work.rows.view(*hidden.shape[:-1], 1))),
        *_copies(hidden, out),
        _dropout(hidden),
    ]
    copy, faster = (Goal("speedup", 1 / 1.5), Goal("speedup", 20)) if goals else (None, None)
    pairs = [
        Pair(f"dropout {name}, forward", "operator", _COPY, copy),
        Pair(f"dropout {name}, forward", "operator", _CLONE),
        Pair(f"dropout {name}, forward", "operator", _DROPOUT, faster),
        Pair(f"dropout {name}, into given memory", "into given memory", _COPY, copy),
        Pair(f"dropout of tokens {name}, forward", "tokens", _CLONE),
    ]
    return _case(work, threads, entrants, pairs)


def _backward(name: str, work: _Work, threads: int, goals: bool) -> Case:
    hidden, gradient = work.hidden.requires_grad_(), work.hidden.detach().flip(0).contiguous()
    dropped = ops.drop_elements(hidden, work.keys, work.samples, work.positions, THRESHOLD, _SCALE)[0]
    theirs = F.dropout(hidden, RATE)

    def back(result: Tensor) -> Tensor:
        return torch.autograd.grad(result, hidden, gradient, retain_graph=True)[0]

    entrants = [
        Entrant(
            "operator",
            lambda: back(dropped),
            lambda: work.drawn_right() and torch.equal(back(dropped), work.dropped(gradient, work.keep)),
        ),
        *_copies(gradient, work.out),
        Entrant(_DROPOUT, lambda: back(theirs), lambda: _dropout_rate(back(theirs))),
    ]
    pairs = [
        Pair(f"dropout {name}, backward", "operator", _COPY, Goal("speedup", 1 / 1.5) if goals else None),
        Pair(f"dropout {name}, backward", "operator", _CLONE),
        Pair(f"dropout {name}, backward", "operator", _DROPOUT),
    ]
    return _case(work, threads, entrants, pairs)


def _copies(source: Tensor, out: Tensor) -> list[Entrant]:
    """The limit: a copy into memory that is there, and one into new memory, which is what an operator returns."""
    source = source.detach()
    return [
        Entrant(_COPY, lambda: out.copy_(source), lambda: torch.equal(out.copy_(source), source)),
        Entrant(_CLONE, source.clone, lambda: torch.equal(source.clone(), source)),
    ]


def _dropout(hidden: Tensor) -> Entrant:
    return Entrant(_DROPOUT, lambda: F.dropout(hidden, RATE), lambda: _dropout_rate(F.dropout(hidden, RATE)))


def _dropout_rate(result: Tensor) -> bool:
    """Whether ``F.dropout`` drops at the rate."""
    return at_rate(int(torch.count_nonzero(result)), result.numel())


def _case(work: _Work, threads: int, entrants: list[Entrant], pairs: list[Pair]) -> Case:
    batch, length, width = work.hidden.shape
    sizes = {"samples": batch, "length": length, "features": width}
    return Case("masks", sizes, "ms", 1e3, threads, entrants, pairs)
