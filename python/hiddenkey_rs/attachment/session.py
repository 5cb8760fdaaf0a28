"""The active step of an attached model, and the passes that its forward passes open and close."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError, StateError, UnsupportedModelError
from ..plan import PlanEntry, StepPlan
from .implementation import Implementation
from .passes import MaskRecorder, StackPass
from .sites import Site, Stack
from .tokens import Tokens, from_packed, from_rows


@dataclass(frozen=True)
class ActiveStep:
    """The optimiser step that forward passes belong to, and which branch(es) of it their rows are."""

    step: int
    samples: np.ndarray
    positions: np.ndarray | None = None
    branches: tuple[int, ...] = (0,)
    force: bool = False
    """Draw masks although no gradient is recorded: the second pass of a two-pass loss."""


class Session:
    """What the hooks of one attached model share while it trains."""

    def __init__(
        self,
        seed: int,
        stacks: list[Stack],
        attention: Mapping[nn.Module, Site],
        implementations: list[Implementation],
        impl: str,
        drops: bool,
    ) -> None:
        self.seed, self.stacks, self.attention, self.impl, self.drops = seed, stacks, attention, impl, drops
        self.implementations = implementations
        self.active: ActiveStep | None = None
        self.last_pass: StackPass | None = None
        """The pass of the stack that ran last; the head behind it belongs to it."""
        self.recorder: MaskRecorder | None = None
        self.target_mask: Tensor | None = None
        """Real tokens of an encoder-decoder's targets, where the batch brings no mask for them."""
        self.capture = False
        self.features: Tensor | None = None
        """What the head received, where ``capture`` asks for it."""
        self.head_receives: Callable[[Tensor], None] | None = None
        """Where a vocabulary head leaves what it received instead of making logits of it."""
        self._running: dict[Stack, StackPass | None] = {}
        self._proven = False

    @contextmanager
    def step(self, active: ActiveStep) -> Iterator[None]:
        """Forward passes inside belong to this step."""
        if self.active is not None:
            raise StateError(
                f"a step is active already (got step {active.step} inside {self.active.step}); leave it first"
            )
        self.active = active
        try:
            yield
        finally:
            self.active = None
            self.last_pass = None

    @contextmanager
    def branches(self, branches: tuple[int, ...], force: bool = False) -> Iterator[None]:
        """Forward passes inside are of these branches; ``force`` draws masks without gradient too."""
        before = self.require_step()
        self.active = replace(before, branches=branches, force=force)
        try:
            yield
        finally:
            self.active = before

    def require_step(self) -> ActiveStep:
        """The active step, or a :class:`StateError`."""
        if self.active is None:
            raise StateError(
                "no step is active, so sample ids are missing (got a loss outside a step); "
                "wrap it in `with handle.step(step, sample_ids):`"
            )
        return self.active

    def running(self, stack: Stack | None) -> StackPass | None:
        """The pass of a stack whose forward pass is under way."""
        return self._running.get(stack) if stack is not None else None

    def see_features(self, hidden: Tensor) -> None:
        """The head received ``hidden``."""
        if self.capture:
            self.features = hidden

    def open(self, stack: Stack, inputs: dict[str, Any]) -> StackPass | None:
        """A stack's forward pass begins: the pass to hand down, or ``None`` for the stock model."""
        step = self._new_pass(stack, inputs) if self._wants_masks(stack) else None
        for implementation in self.implementations:
            implementation.begin(step is not None)
        for layer in stack.layers:
            layer.current = None
        self._running[stack] = step
        self.last_pass = step
        return step

    def close(self, stack: Stack, step: StackPass | None, failed: bool) -> None:
        """A stack's forward pass is over (``failed``: by an exception)."""
        for implementation in self.implementations:
            implementation.end()
        self._running[stack] = None
        if step is None:
            return
        step.running = False
        if not self._proven and not failed:
            self._prove_reached(stack, step)

    def _wants_masks(self, stack: Stack) -> bool:
        if not stack.module.training or not self.drops:
            return False
        if self.active is None:
            if torch.is_grad_enabled():
                raise StateError(
                    "a training forward pass ran outside a step, so its sample ids are missing (got no active step); "
                    "wrap it in `with handle.step(step, sample_ids):`"
                )
            return False
        return torch.is_grad_enabled() or self.active.force

    def _new_pass(self, stack: Stack, inputs: dict[str, Any]) -> StackPass:
        active = self.require_step()
        tokens = self._tokens(stack, active, inputs)
        encoder = inputs.get("encoder_hidden_states")
        encoder_tokens = None
        if encoder is not None:
            encoder_tokens = self._encoder_side(active, inputs, encoder)
        return StackPass(
            self.seed,
            active.step,
            tokens,
            encoder_tokens,
            self.attention,
            self.impl,
            recorder=self.recorder,
            plans=(
                self._plan(stack.entries[0], active, tokens),
                self._plan(stack.entries[1] if encoder_tokens is not None else (), active, encoder_tokens or tokens),
            ),
        )

    def _plan(self, entries: tuple[PlanEntry, ...], active: ActiveStep, tokens: Tokens) -> StepPlan:
        """Every column and span mask of a pass in one call, so that no layer waits for one."""
        documents = (tokens.samples, tokens.branches, tokens.lengths, tokens.columns)
        return StepPlan(self.seed, active.step, entries, *documents)

    def _encoder_side(self, active: ActiveStep, inputs: dict[str, Any], encoder: Tensor) -> Tokens:
        if active.samples.ndim == 2:
            raise DataError(
                f"rows of an encoder-decoder cannot be packed (got sample ids of shape {active.samples.shape}); "
                "give one sample id a row"
            )
        return from_rows(active.samples, _real(inputs.get("encoder_attention_mask"), encoder), active.branches)

    def _tokens(self, stack: Stack, active: ActiveStep, inputs: dict[str, Any]) -> Tokens:
        ids = inputs.get("input_ids")
        embeds = ids if ids is not None else inputs.get("inputs_embeds")
        if embeds is None:
            raise DataError("the stack received neither input_ids nor inputs_embeds (got None); pass one of them")
        if active.samples.ndim == 2:
            if (
                active.samples.shape[0] * len(active.branches) != embeds.shape[0]
                or active.samples.shape[1] != embeds.shape[1]
            ):
                raise DataError(
                    f"packed sample ids must have the shape of the batch (got {active.samples.shape} for "
                    f"{tuple(embeds.shape[:2])}); give one id a token, -1 at padding"
                )
            return from_packed(active.samples, active.positions, active.branches, embeds.device)
        mask = inputs.get("attention_mask")
        if mask is None and stack.role == "decoder":
            mask = self.target_mask
        return from_rows(active.samples, _real(mask, embeds), active.branches)

    def _prove_reached(self, stack: Stack, step: StackPass) -> None:
        """After the first pass: every site that should drop was called, or the model does not do what it seems to."""
        if getattr(stack.module, "layerdrop", 0):  # LayerDrop may skip any layer of any pass
            return
        missed = [
            site.name
            for site in stack.sites
            if site.drops and site not in step.reached and site.kind != "input" and not _idle_cross(site, step)
        ]
        if missed:
            raise UnsupportedModelError(
                f"{len(missed)} site(s) were never called in the first training pass (got {', '.join(missed[:3])}); "
                "another library has replaced the model's forward code, or the layer does not run"
            )
        self._proven = stack is self.stacks[-1]


def _idle_cross(site: Site, step: StackPass) -> bool:
    return site.kind == "cross-attention" and step.encoder_tokens is None


def _real(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Which tokens are no padding, (B, L) bool. Without a 2-D mask every token counts as real."""
    if mask is None or mask.dim() != 2:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.shape != tokens.shape[:2]:
        raise DataError(
            f"the attention mask covers other tokens than the batch (got {tuple(mask.shape)} for "
            f"{tuple(tokens.shape[:2])}); train without a cache, one mask entry a token"
        )
    return mask.to(torch.bool)
