"""Every Triton attention kernel against the reference: output and gradients of small odd shapes, padding and all.

Rows hold an error instead of a time: the largest difference in parts of the largest number, against what it may be.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import masks, ops
from ..config import threshold
from ..masks import MaskKey
from ..ops import triton_attention
from ..ops.documents import Documents
from . import devices
from .harness import Goal, Row

_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_RATE = 0.3


@dataclass(frozen=True)
class Problem:
    """One attention to compare. ``lengths``: real tokens of each example; ``left``: padding stands in front of them."""

    pattern: str
    position: str
    causal: bool
    window: int | None
    heads: int
    groups: int
    features: int
    lengths: tuple[int, ...]
    length: int
    dtype: torch.dtype
    left: bool = False
    gather: bool = False
    """Whether kept keys are visited alone."""

    @property
    def name(self) -> str:
        """As the row's case says it."""
        seen = f"{'causal' if self.causal else 'bidirectional'}{f', window {self.window}' if self.window else ''}"
        return f"{self.pattern} {self.position}, {seen}{', gathered' if self.gather else ''}"


def problems(tiny: bool) -> Iterator[Problem]:
    """All combinations that have a kernel of their own; ``tiny``: a few of them, small enough for an interpreter."""
    patterns = list(itertools.product(("element", "column", "span"), ("dropkey", "dropattention")))
    if tiny:
        for number, (pattern, position) in enumerate(patterns):
            left = number % 2 == 0
            how = (pattern, position, not left, None, 2, 1, 16, (9, 17), 17, torch.float32, left)
            yield Problem(*how, gather=(pattern, position) == ("span", "dropkey"))
        return
    # First, so that no lack of time leaves these out: every dtype, and heads from narrow to wide.
    shapes = [(64, dtype) for dtype in _TOLERANCES] + [(size, torch.bfloat16) for size in (32, 80, 128, 256)]
    for (number, (features, dtype)), causal in itertools.product(enumerate(shapes), (False, True)):
        pattern, window = ("column", "span")[(number + causal) % 2], 70 if features == 128 else None
        kept = (4, 2, features, (129, 1, 300, 127), 301, dtype)
        yield Problem(pattern, "dropkey", causal, window, *kept, left=features == 80, gather=True)
    # Not every width with every dtype: each is three kernels more to compile, and time is short.
    shapes.append((128, torch.float32))
    for (pattern, position), causal, (features, dtype) in itertools.product(patterns, (False, True), shapes):
        yield Problem(pattern, position, causal, None, 4, 2, features, (129, 1, 300, 127), 301, dtype, features == 80)
    for pattern, position in patterns:
        yield Problem(pattern, position, True, 70, 4, 4, 64, (257, 100), 257, torch.bfloat16)


def check(device: str, place: Mapping[str, Any], some: Iterable[Problem]) -> Iterator[Row]:
    """One row a problem; ``checked`` says whether the error is small enough."""
    for problem in some:
        try:
            error = _error(problem, device)
        except Exception as failure:  # a kernel that does not compile is a failed row, and the others still count
            devices.say(f"check failed: {problem.name}: {type(failure).__name__}: {failure}")
            error = float("inf")
        allowed = _TOLERANCES[problem.dtype]
        sizes = {
            "length": problem.length,
            "batch": len(problem.lengths),
            "heads": problem.heads,
            "kv_heads": problem.groups,
            "head_size": problem.features,
            "rate": _RATE,
            "dtype": str(problem.dtype).removeprefix("torch."),
        }
        right = error <= allowed
        if not right:
            devices.say(f"check failed: {problem.name} {sizes}: error {error:.2e} of the largest number")
        peer = {"name": "tolerance", **_exact(allowed)}
        goal = Goal("median", allowed)
        yield Row("kernels", problem.name, sizes, 1, "error", _exact(error), peer, goal, right, about=place)


def _error(problem: Problem, device: str) -> float:
    """The largest relative difference among output and gradients; the mask is the Rust core's."""
    batch, length = len(problem.lengths), problem.length
    generator = torch.Generator().manual_seed(3)

    def made(heads: int) -> Tensor:
        drawn = torch.randn(batch, length, heads, problem.features, generator=generator)
        return drawn.to(device, problem.dtype).transpose(1, 2)

    query, gradient = made(problem.heads).requires_grad_(), made(problem.heads)
    key, value = (made(problem.groups).requires_grad_() for _ in range(2))
    column, counts = torch.arange(length), torch.tensor(problem.lengths)[:, None]
    real = (column >= length - counts) if problem.left else (column < counts)
    position = (real.cumsum(1) - 1).clamp(min=0)
    samples = 5 + 3 * torch.arange(batch)
    place = MaskKey(seed=9, step=4, layer=2, site="attention")
    keep = _keep(problem, place, samples)
    document = torch.arange(batch)[:, None].expand(-1, length)
    documents = Documents.of_tokens(samples, *(t.to(device) for t in (document, position, real)))
    drawn: dict[str, Any] = {"keep": keep[:, :, 0].to(device)}
    if problem.pattern == "element":
        drawn = {"keys": torch.tensor([place.derive()], device=device), "threshold": threshold(_RATE)}
    settings: dict[str, Any] = {
        "position": problem.position,
        "causal": problem.causal,
        "window": problem.window,
        "gather": problem.gather,
    }
    output, _ = triton_attention.attention(query, key, value, documents, **settings, **drawn)
    found = (output, *torch.autograd.grad(output, (query, key, value), gradient))

    allowed = real[:, None, None] & real[:, None, :, None]
    if problem.causal:
        allowed = allowed & ops.causal(length, length)
    if problem.window:
        allowed = allowed & ((column[:, None] - column).abs() < problem.window)
    laid = keep.repeat_interleave(problem.heads // problem.groups, 1)
    laid = laid.expand(-1, -1, laid.shape[2] if problem.pattern == "element" else 1, -1)
    rows = position if problem.pattern == "element" else torch.zeros_like(position)
    example = torch.arange(batch)[:, None, None]
    pairs = laid.transpose(0, 1)[:, example, rows[:, :, None], position[:, None]].transpose(0, 1)
    kept = ops.kept_set(allowed, pairs, rescue="own", queries=length, keys=length).to(device)
    inputs = [t.detach().float().requires_grad_() for t in (query, key, value)]
    right = ops.reference.attention(*inputs, allowed=allowed.to(device), kept=kept, position=problem.position)
    expected = (right, *torch.autograd.grad(right, inputs, gradient.float()))
    errors = [
        (one.detach().float() - other.detach()).abs().max() / other.detach().abs().max()
        for one, other in zip(found, expected, strict=True)
    ]
    worst = float(torch.stack(errors).max())
    return worst if worst == worst else float("inf")


def _keep(problem: Problem, place: MaskKey, samples: Tensor) -> Tensor:
    """The drawn mask in the examples' own coordinates: bool (batch, groups, 1 or rows, columns)."""
    ids, groups, most = samples.numpy(), problem.groups, max(problem.lengths)
    if problem.pattern == "element":
        return torch.from_numpy(masks.element_bool(place, ids, most, most, _RATE, heads=groups))
    if problem.pattern == "column":
        return masks.column(place, ids, most, _RATE, heads=groups).to_torch()
    return masks.span(place, ids, problem.lengths, _RATE, heads=groups).to_torch()


def _exact(error: float) -> dict[str, Any]:
    return {"median": error, "p10": error, "p90": error, "n": 1}
