"""The ways to compute an attention that ``bench attention`` times, each a function of one :class:`Work`.

A path runs forward and backward, draws its mask and gathers within the time, and leaves its output where the model's
next projection reads it. What is ours goes through :func:`_dropped` and :func:`_triton` alone: where the library's own
calls change, these follow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import masks, ops
from ..config import AttentionDrop, HiddenKeyConfig, threshold
from ..masks import MaskKey
from ..plan import plan_step
from ..transfer import to_device

SEED = 11
GATHERED, BLOCKED, BOOLEAN, KERNEL, KEPT = "gathered", "blocked", "boolean row", "triton", "triton, gathered"
PLAIN, FLASH, DROPOUT, DENSE = "SDPA", "SDPA, flash", "SDPA, dropout_p", "SDPA, dense mask"
LAYERS = 12
"""Of the model whose attention this is one of."""
_REFERENCE_PAIRS = 1 << 22
"""Query-key pairs that the reference computes at a time: it holds a dozen tables of them."""

Result = tuple[Tensor, Tensor, Tensor, Tensor]
"""Output (B, L, H, D), and the gradients of queries, keys and values (B, H or Hkv, L, D)."""


@dataclass(frozen=True)
class Layout:
    """Heads of an attention, and what may be attended to."""

    heads: int = 12
    groups: int = 12
    features: int = 64
    causal: bool = False
    pattern: str = "column"
    position: str = "dropkey"

    def __str__(self) -> str:
        heads = f"H {self.heads}" if self.heads == self.groups else f"H {self.heads}/{self.groups}"
        return f"{heads} D {self.features}{' causal' if self.causal else ''}"

    @property
    def name(self) -> str:
        """What is dropped and how, as a row's case says it."""
        position = "DropKey" if self.position == "dropkey" else "DropAttention"
        return f"{self.pattern} {position}{', causal' if self.causal else ''}"


class Work:
    """Queries, keys and values as a model's projections leave them, and the gradient of the output.

    Memory is (B, L, H, D), seen as (B, H, L, D): what ``linear(x).view(...).transpose(1, 2)`` gives.
    """

    def __init__(self, layout: Layout, batch: int, length: int, dtype: torch.dtype, device: str) -> None:
        self.layout, self.batch, self.length, self.device = layout, batch, length, device
        generator = torch.Generator(device).manual_seed(1)

        def heads(count: int) -> Tensor:
            made = torch.randn(batch, length, count, layout.features, generator=generator, device=device)
            return made.to(dtype).transpose(1, 2)

        self.query = heads(layout.heads).requires_grad_()
        self.key, self.value = (heads(layout.groups).requires_grad_() for _ in range(2))
        self.gradient = heads(layout.heads).transpose(1, 2)
        self.allowed = (
            ops.causal(length, length, device)
            if layout.causal
            else torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)
        )
        self.scaling = layout.features**-0.5
        self._ids = np.arange(batch)
        self._planned: tuple[tuple[float, int], dict[tuple[int, str], Tensor]] | None = None

    def keep(self, rate: float, step: int) -> Tensor:
        """A column or span mask as an attached model draws it, bool (B, Hkv, L) on the device.

        All layers' masks of a step are planned in one go, and travel in one: so every twelfth call does that.
        """
        number, layer = divmod(step, LAYERS)
        if self._planned is None or self._planned[0] != (rate, number):
            drop = AttentionDrop(pattern=self.layout.pattern, rate=rate)
            config = HiddenKeyConfig(attention=drop, hidden=None, consistency=None, layers="all", seed=SEED)
            lengths = np.full(self.batch, self.length)
            plan = plan_step(config, number, self._ids, lengths, layers=LAYERS, heads=self.layout.groups)
            self._planned = (rate, number), plan.all_to_torch(self.device)
        return self._planned[1][layer, "attention"][:, :, 0]

    def elements(self, rate: float, step: int, example: int) -> Tensor:
        """One example's element mask, bool (1, H, L, L): one a query head."""
        key = MaskKey(seed=SEED, step=step, site="attention")
        if self.device != "cpu":
            sample = torch.tensor([example], device=self.device)
            return ops.element_keep(key.derive(), sample, self.length, self.length, threshold(rate), self.layout.heads)
        drawn = masks.element_bool(key, [example], self.length, self.length, rate, heads=self.layout.heads)
        return torch.from_numpy(drawn)

    def every_head(self, grouped: Tensor) -> Tensor:
        """Key/value heads repeated to query heads."""
        repeats = self.layout.heads // self.layout.groups
        return grouped if repeats == 1 else grouped.repeat_interleave(repeats, dim=1)

    def finish(self, output: Tensor) -> Result:
        """Lay the output out for the next projection, and run backward."""
        output = output.transpose(1, 2).contiguous()
        query, key, value = torch.autograd.grad(output, self._inputs, self.gradient)
        return output.detach(), query, key, value

    @cached_property
    def documents(self) -> Any:
        """What the kernels walk over, made once a pass in an attached model and not once a layer."""
        from ..ops.documents import Documents

        position = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        document = torch.arange(self.batch, device=self.device)[:, None].expand(-1, self.length)
        real = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        return Documents.of_tokens(torch.arange(self.batch), document, position, real)

    @cached_property
    def undropped(self) -> Result:
        """The reference's result without any dropout."""
        return self.reference(0.0, 0)

    def reference(self, rate: float, step: int) -> Result:
        """What is right by :mod:`hiddenkey_rs.ops.reference`, in float32, a few examples or heads at a time."""
        out = torch.empty(self.gradient.shape, device=self.device)
        grads = [torch.empty(t.shape, device=self.device) for t in (self.query, self.key, self.value)]
        keep = self.keep(rate, step) if rate and self.layout.pattern != "element" else None
        pairs, repeats = self.length**2, self.layout.heads // self.layout.groups
        many = max(1, _REFERENCE_PAIRS // (pairs * self.layout.heads)) if self.layout.pattern != "element" else 1
        groups = self.layout.groups if many > 1 else max(1, _REFERENCE_PAIRS // (pairs * repeats))
        causal = self.allowed if self.layout.causal else None
        for first in range(0, self.batch, many):
            drawn = self.elements(rate, step, first) if rate and keep is None else None
            for start in range(0, self.layout.groups, groups):
                rows, few = slice(first, first + many), slice(start, start + groups)
                wide = slice(start * repeats, (start + groups) * repeats)
                chosen = keep[rows, few, None].repeat_interleave(repeats, 1) if keep is not None else None
                chosen = drawn[:, wide] if drawn is not None else chosen
                inputs = [t[rows, w].detach().float() for t, w in zip(self._inputs, (wide, few, few), strict=True)]
                [t.requires_grad_() for t in inputs]
                output = ops.reference.attention(
                    *inputs, allowed=causal, kept=self._kept(causal, chosen), position=self.layout.position
                )
                back = torch.autograd.grad(output, inputs, self.gradient[rows, :, wide].float().transpose(1, 2))
                out[rows, :, wide] = output.detach().transpose(1, 2)
                for grad, part, where in zip(grads, back, (wide, few, few), strict=True):
                    grad[rows, where] = part
        return out, grads[0], grads[1], grads[2]

    @property
    def _inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def _kept(self, allowed: Tensor | None, keep: Tensor | None) -> Tensor | None:
        if keep is None:
            return allowed
        return ops.kept_set(allowed, keep, rescue="own", queries=self.length, keys=self.length)


Path = Callable[[Work, float, int], Result]
"""(work, rate, step) -> the result of one forward and backward pass."""


def _plain(work: Work, rate: float, step: int) -> Result:
    """As transformers calls it where there is no mask."""
    layout = work.layout
    grouped = layout.heads != layout.groups
    return work.finish(
        F.scaled_dot_product_attention(work.query, work.key, work.value, is_causal=layout.causal, enable_gqa=grouped)
    )


def _flash(work: Work, rate: float, step: int) -> Result:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _plain(work, rate, step)


def _dropout(work: Work, rate: float, step: int) -> Result:
    key, value = work.every_head(work.key), work.every_head(work.value)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if work.device != "cpu" else nullcontext():
        return work.finish(
            F.scaled_dot_product_attention(work.query, key, value, dropout_p=rate, is_causal=work.layout.causal)
        )


def _dense(work: Work, rate: float, step: int) -> Result:
    """A mask of every query-key pair, as a DropKey of one's own has it; the drawing is ours, which flatters it."""
    key, value = work.every_head(work.key), work.every_head(work.value)
    keep = work.every_head(work.keep(rate, step))[:, :, None].expand(-1, -1, work.length, -1)
    kept = ops.kept_set(work.allowed, keep, rescue="own", queries=work.length, keys=work.length).contiguous()
    return work.finish(F.scaled_dot_product_attention(work.query, key, value, attn_mask=kept))


def _boolean(work: Work, rate: float, step: int) -> Result:
    """Ours without gathering: one row of flags a head, where causality does not ask for more."""
    return work.finish(_dropped(work, rate, step, "sdpa"))


def _gathered(work: Work, rate: float, step: int) -> Result:
    """Ours, dropped keys gathered away (CPU)."""
    return work.finish(_dropped(work, rate, step, "compact"))


def _blocked(work: Work, rate: float, step: int) -> Result:
    """Ours where masks differ by query (CPU): of plain causal attention one call of torch's kernel."""
    return work.finish(_dropped(work, rate, step, "blocked"))


def _dropped(work: Work, rate: float, step: int, impl: str) -> Tensor:
    """The call that an attached model's attention makes."""
    return ops.dropped_attention(
        work.query,
        work.key,
        work.value,
        allowed=work.allowed,
        keep=work.keep(rate, step)[:, :, None],
        rescue="own",
        rate=rate,
        scaling=work.scaling,
        impl=impl,
    )[0]


def _kernel(work: Work, rate: float, step: int) -> Result:
    """Ours in Triton: element masks are drawn inside the kernels, dropped columns are masked there."""
    return _triton(work, rate, step, gather=False)


def _kept(work: Work, rate: float, step: int) -> Result:
    """Ours in Triton, kept keys visited alone."""
    return _triton(work, rate, step, gather=True)


def _triton(work: Work, rate: float, step: int, gather: bool) -> Result:
    from ..ops import triton_attention

    layout = work.layout
    drawn: dict[str, Any] = {}
    if layout.pattern == "element":
        site = MaskKey(seed=SEED, step=step, site="attention").derive()
        keys = to_device(torch.tensor([site]), torch.device(work.device))
        drawn = {"keys": keys, "threshold": threshold(rate), "heads": "query"}
    else:
        drawn = {"keep": work.keep(rate, step)}
    output, _ = triton_attention.attention(
        work.query,
        work.key,
        work.value,
        work.documents,
        position=layout.position,
        causal=layout.causal,
        scaling=work.scaling,
        gather=gather,
        **drawn,
    )
    return work.finish(output)


PATHS: dict[str, Path] = {
    PLAIN: _plain,
    FLASH: _flash,
    DROPOUT: _dropout,
    DENSE: _dense,
    BOOLEAN: _boolean,
    GATHERED: _gathered,
    BLOCKED: _blocked,
    KERNEL: _kernel,
    KEPT: _kept,
}
