"""What people draw masks with today, as entrants of a benchmark. One rate for all: p = 0.1."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import threshold
from .harness import Entrant

RATE = 0.1
THRESHOLD = threshold(RATE)
BERNOULLI = "torch bernoulli_"
_KEEP = 1 - RATE


def draws(size: int, threads: int = 1, times: int = 1) -> Iterator[Entrant]:
    """``size`` decisions drawn ``times`` over, by every generator that is at hand; ``bernoulli_`` comes first.

    All write into memory that is there already: a bool a decision, and a float where a generator needs one.
    NumPy's run on one thread, so they take part only with ``threads`` = 1.
    """
    floats, masks = np.empty(size, np.float32), [np.empty(size, np.bool_) for _ in range(times)]
    numbers = torch.from_numpy(floats)

    def in_torch(name: str, draw: Callable[[Tensor], object]) -> Entrant:
        flags = [torch.from_numpy(mask) for mask in masks]

        def call() -> None:
            for keep in flags:
                draw(keep)

        return Entrant(name, call, check(call))

    def in_numpy(name: str, draw: Callable[[NDArray[np.bool_]], object]) -> Entrant:
        def call() -> None:
            for keep in masks:
                draw(keep)

        return Entrant(name, call, check(call))

    def check(call: Callable[[], object]) -> Callable[[], bool]:
        def right() -> bool:
            for keep in masks:
                keep[:] = False
            call()
            return at_rate(sum(int(np.count_nonzero(keep)) for keep in masks), times * size)

        return right

    yield in_torch(BERNOULLI, lambda keep: keep.bernoulli_(_KEEP))
    yield in_torch("torch.rand < p", lambda keep: torch.lt(torch.rand(size, out=numbers), _KEEP, out=keep))
    stateless = _stateless()
    if stateless is not None:
        key = stateless.key(1)
        yield in_torch(
            "torch.func._random < p", lambda keep: torch.lt(stateless.uniform_(key, numbers), _KEEP, out=keep)
        )
    if threads == 1:
        for bits in (np.random.SFC64, np.random.Philox):
            yield in_numpy(f"numpy {bits.__name__} < p", _numpy_draw(np.random.Generator(bits(1)), floats))


def at_rate(kept: int, size: int) -> bool:
    """Whether a count of kept decisions is within six standard deviations of the rate's.

    Example:
        >>> at_rate(900, 1000), at_rate(100, 1000)
        (True, False)
    """
    return abs(kept - _KEEP * size) <= 6 * (RATE * _KEEP * size) ** 0.5 + 1


def _numpy_draw(generator: np.random.Generator, floats: NDArray[np.float32]) -> Callable[[NDArray[np.bool_]], object]:
    return lambda keep: np.less(generator.random(dtype=np.float32, out=floats), _KEEP, out=keep)


def _stateless() -> Any:
    """The stateless Philox that torch has since 2.15; None before."""
    try:
        return importlib.import_module("torch.func._random")
    except ImportError:
        return None
