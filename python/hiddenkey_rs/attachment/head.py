"""Task loss and consistency of a vocabulary head, on the tokens that carry loss, a few at a time.

A head over a vocabulary makes the largest tensors of a step: (tokens, vocabulary) logits, their float32 copies and their
gradients, twice with a second pass. Here the head hands over what it received instead, and logits exist for one piece of
the loss-bearing tokens at a time: made, turned into both terms and their gradients, and gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from .compared import is_for
from .terms import both_terms

if TYPE_CHECKING:
    from .handle import Handle


LEAST_ROWS = 64
"""Tokens of a piece, at least: fewer would not keep a head busy."""
LEAST_LOGITS = 3 << 22
"""Logits of a piece, at least, on an accelerator: 48 MiB in float32. A piece is some fifty operators, which the host must keep
up with: pieces as small as a CPU's took an H100 longer than the model did. It holds some 40 bytes a logit."""


@dataclass(eq=False)
class Head:
    """A vocabulary head: the module that makes logits, and what the model does to them afterwards."""

    module: nn.Module
    softcap: float | None
    bias: Callable[[], Tensor | None]
    """Asked each time: a model that moves to another device has another buffer."""
    scale: float = 1.0
    autocast: dict[str, Any] = field(default_factory=dict)
    """How the model ran its head: a trainer may wrap the model's forward alone."""
    observer: Callable[[Tensor, Tensor], None] | None = None
    """Is shown the gradient pass's logits, (n, vocabulary) float32, and labels, (n,), of every piece: for metrics."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, vocabulary) of (N, D) hidden states."""
        with torch.autocast(**self.autocast) if self.autocast else nullcontext():
            logits = self.module.forward(hidden)  # not __call__: what hooks do was done when the whole batch came by
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        bias = self.bias()
        return (logits if bias is None else logits + bias).float()

    def is_half(self, hidden: Tensor) -> bool:
        """Whether its gradients pass through float16, where small numbers vanish."""
        automatic = self.autocast["dtype"] if self.autocast.get("enabled") else None
        return torch.float16 in (hidden.dtype, automatic)

    @property
    def parameters(self) -> list[Tensor]:
        """What of it is trained."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def head_of(handle: Handle) -> Head | None:
    """The model's vocabulary head, if its loss is the mean cross-entropy over tokens and nothing else."""
    base, config = handle.base, handle.base.config
    module = base.get_output_embeddings()
    named = any(
        is_for(word, base) for word in ("LMHead", "ForCausalLM", "ConditionalGeneration", "MaskedLM", "MTModel")
    )
    routed = getattr(config, "output_router_logits", False)
    if module is None or not named or routed or not _plain_loss(handle.model, base):
        return None
    # Without labels, who else could make a decoder's inputs?
    if config.is_encoder_decoder and not hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return None
    # Granite divides its logits, Cohere multiplies them.
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    held = ref(base)  # hooks hold the head
    return Head(module, softcap, lambda: getattr(held(), "final_logits_bias", None), scale)


def _plain_loss(model: nn.Module, base: nn.Module) -> bool:
    """Whether the model's loss is made by transformers' own code alone, without anything that a caller put in or added."""
    maker = next(kind for kind in type(base).__mro__ if "forward" in vars(kind))
    # AdaLoRA adds its regulariser to the loss of the model that it wraps.
    tuner = model.base_model if model is not base else None
    adds = tuner is not None and "forward" in vars(type(tuner))
    return maker.__module__.startswith("transformers.") and not hasattr(base, "_loss_function") and not adds


def head_for(handle: Handle, batch: dict[str, Any]) -> Head | None:
    """:attr:`Handle.head`, if this batch's loss is made of what it received: some arguments and settings change the loss."""
    # A router's balancing loss is made inside the model, from the labels' presence.
    routed = batch.get("output_router_logits", getattr(handle.base.config, "output_router_logits", False))
    return None if routed or batch.get("logits_to_keep") is not None else handle.head


@contextmanager
def without_logits(handle: Handle) -> Iterator[list[Tensor]]:
    """Forward passes inside leave what their head received, (B, L, D), in the list, and make no logits."""
    received: list[Tensor] = []
    session = handle.session
    session.head_receives = received
    try:
        yield received
    finally:
        session.head_receives = None


def note_autocast(head: Head, hidden: Tensor) -> None:
    """Remember under which automatic precision the model runs its head."""
    device = hidden.device.type
    enabled = torch.is_autocast_enabled(device)
    head.autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device), "enabled": enabled}


def token_losses(
    head: Head,
    first: Tensor,
    second: Tensor | None,
    labels: Tensor,
    *,
    kind: str | None,
    both: bool,
    scales: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens of both terms, and the loss: (task * scales[0] + consistency * scales[1], task, consistency).

    Args:
        head: what makes logits.
        first, second: (N, D), what it received in the gradient pass and in the other one (``None``: there is none).
        labels: (N,). kind: of the consistency term. both: gradient and task loss through ``second`` too.
        scales: 0-dim; the loss has them inside, so that gradients are made while a piece's logits exist.

    Only the first result has a gradient.
    """
    boost = torch.exp2(-torch.floor(torch.log2(scales[0]))) if head.is_half(first) else None
    run = _Pieces(head, labels, kind, both, scales, boost, torch.is_grad_enabled())
    return _TokenLosses.apply(run, first, second, *head.parameters)  # type: ignore[no-any-return]


@dataclass(eq=False)
class _Pieces:
    """The loop over pieces of tokens."""

    head: Head
    labels: Tensor
    kind: str | None
    both: bool
    scales: tuple[Tensor, Tensor]
    boost: Tensor | None = None
    """A power of two, about the number of tokens: float16 gradients are made this much larger, since a trainer scales the
    loss when they are made already."""
    differentiated: bool = True
    """Whether gradients are made at all."""

    def run(self, states: list[Tensor | None], wanted: list[bool]) -> tuple[list[Tensor], list[Tensor | None]]:
        """(loss, task, consistency), and the loss' gradients: of states, then of the head's parameters."""
        first = states[0]
        assert first is not None
        parameters = self.head.parameters
        rows = rows_of_a_piece(first, self.vocabulary(first))
        totals = [first.new_zeros((), dtype=torch.float32) for _ in range(3)]
        kind = torch.float32 if self.boost is not None else None
        boosted = self.scales if self.boost is None else (self.scales[0] * self.boost, self.scales[1] * self.boost)
        gradients: list[Tensor | None] = [
            torch.empty_like(state, dtype=kind) if state is not None and want else None
            for state, want in zip(states, wanted, strict=False)
        ]
        # Of a parameter that the head does not use there is no gradient; where no token carries loss, one of zeros: ranks
        # wait for each other's.
        trained: list[Tensor | None] = [None if len(first) else torch.zeros_like(p, dtype=kind) for p in parameters]
        for start in range(0, len(first), rows):
            piece = slice(start, start + rows)
            leaves = [
                None if s is None else s[piece].detach().requires_grad_(w) for s, w in zip(states, wanted, strict=False)
            ]
            assert leaves[0] is not None
            with torch.set_grad_enabled(any(wanted)):
                logits = [self.head.logits(leaves[0])]
            if self.head.observer is not None:
                self.head.observer(logits[0].detach(), self.labels[piece])
            others = None if leaves[1] is None else self.other_logits(leaves[1], self.both and any(wanted))
            logits += [] if others is None else [others]
            task, consistency, slopes = both_terms(
                logits[0],
                others,
                self.labels[piece],
                self.kind,
                both=self.both,
                scales=boosted if any(wanted) else None,
            )
            terms = (task * self.scales[0] + consistency * self.scales[1], task, consistency)
            for total, term in zip(totals, terms, strict=True):
                total += term
            targets = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            targets += parameters if any(wanted[2:]) else []
            if not targets:
                continue
            found = iter(torch.autograd.grad(logits[: len(slopes)], targets, slopes, allow_unused=True))
            for gradient in gradients:
                if gradient is not None:
                    gradient[piece] = next(found)
            for number, part in enumerate(found):
                before = trained[number]
                if part is not None:
                    trained[number] = part.to(kind or part.dtype) if before is None else before.add_(part)
        return totals, [*gradients, *(trained if any(wanted[2:]) else [None] * len(parameters))]

    def other_logits(self, hidden: Tensor, differentiated: bool) -> Tensor:
        """The other pass's logits."""
        with torch.set_grad_enabled(differentiated):
            return self.head.logits(hidden)

    def vocabulary(self, hidden: Tensor) -> int:
        """How many logits the head makes."""
        if type(self.head.module) is nn.Linear:
            return self.head.module.out_features
        with torch.no_grad():
            return self.head.logits(hidden[:1]).shape[-1] if len(hidden) else 1


def rows_of_a_piece(hidden: Tensor, vocabulary: int) -> int:
    """How many tokens' logits exist at a time, of (N, D) hidden states.

    Example:
        >>> rows_of_a_piece(torch.empty(4096, 512), 8192), rows_of_a_piece(torch.empty(4096, 512, device="meta"), 8192)
        (256, 1536)
    """
    # A piece's logits are as large as all of the hidden states, which the step holds many times over anyway.
    most = hidden.numel() if hidden.device.type == "cpu" else max(hidden.numel(), LEAST_LOGITS)
    return max(LEAST_ROWS, most // max(vocabulary, 1))


class _TokenLosses(torch.autograd.Function):
    """Makes the gradients together with the loss; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, run: _Pieces, first: Tensor, second: Tensor | None, *parameters: Tensor) -> Any:
        wanted = [need and run.differentiated for need in ctx.needs_input_grad[1:]]
        wanted[1] = wanted[1] and run.both
        totals, gradients = run.run([first, second], wanted)
        ctx.gradients, ctx.boost = gradients, run.boost
        ctx.kinds = [None if tensor is None else tensor.dtype for tensor in (first, second, *parameters)]
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the loss of a step was differentiated twice; keep its gradient instead")
        if ctx.boost is not None:
            scale = scale.float() / ctx.boost
            scaled = zip(gradients, ctx.kinds, strict=True)
            return None, *(None if g is None else (g * scale).to(kind) for g, kind in scaled)
        return None, *(None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients)
