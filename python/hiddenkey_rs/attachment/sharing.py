"""Layers that run once for both passes of a two-pass loss: those below the first one that drops anything.

Up to there both passes are the same computation. The gradient pass leaves the output of the last such layer, and in the
second pass every one of them hands that on in place of its own. In compiled code the pass itself carries it, and the
layers' forward methods, replaced for good, look whether it does: a graph would be compiled anew for other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .sites import Stack

if TYPE_CHECKING:
    from .handle import Handle
    from .session import Session


class Sharing:
    """Which layers of a model's stacks both passes share, and the outputs that the gradient pass left."""

    def __init__(self, handle: Handle) -> None:
        self.layers: list[list[nn.Module]] = []
        self.reason: str | None = _obstacle(handle)
        if self.reason is None:
            self.layers = _common(handle.stacks)
            if not self.layers:
                self.reason = "the first layer drops already"
        self._session = handle.session
        self._replaced: list[nn.Module] = []

    def detach(self) -> None:
        """Give layers their own forward methods back."""
        for layer in self._replaced:
            del layer.forward
        self._replaced = []

    def in_graphs(self, kind: str) -> bool:
        """Whether the two passes of a compiled model can share layers, too."""
        # An undropped pass takes nothing from us, and nothing but its result leaves a checkpointed layer.
        layers = [layer for layers in self.layers for layer in layers]
        return (
            bool(layers)
            and kind != "js"
            and not any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        )

    @property
    def count(self) -> int:
        """How many layers run once for both passes."""
        return sum(len(layers) for layers in self.layers)

    @contextmanager
    def recording(self, compiled: bool) -> Iterator[None]:
        """A gradient pass inside leaves what the second pass will need. Replays of checkpoints come later, outside."""
        self._session.left = {}
        with ExitStack() as removers:
            if compiled:
                self._replace()
            else:
                drawn = self._drawn()
                for number, layers in enumerate(self.layers):
                    # Before hooks of others, which act on what the layer hands on in either pass.
                    removers.callback(
                        layers[-1].register_forward_hook(self._keeper(number, drawn), prepend=True).remove
                    )
            yield

    @contextmanager
    def skipping(self, compiled: bool) -> Iterator[None]:
        """A pass inside takes what the last gradient pass left, and runs none of the shared layers."""
        left, self._session.left = self._session.left, {}
        with ExitStack() as removers:
            if compiled:
                self._session.handed = left
                removers.callback(self._session.handed.clear)
            else:
                for number, layers in enumerate(self.layers):
                    for layer in layers:
                        removers.enter_context(_handing_on(layer, left.get(number)))
            yield

    def _replace(self) -> None:
        if not self._replaced:
            for number, layers in enumerate(self.layers):
                for layer in layers:
                    layer.forward = _sharing_forward(layer, self._session, number, layer is layers[-1])
                    self._replaced.append(layer)

    def _keeper(self, number: int, drawn: list[Tensor]) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self.layers and not _equal(drawn, self._drawn()):
                # Noise on embeddings (NEFTune), of adapters or of routers: from here on both passes run all layers.
                self.layers, self.reason = [], "something below the first dropping layer draws anew in every pass"
            self._session.left[number] = _detached(output)

        return keep

    def _drawn(self) -> list[Tensor]:
        """How far torch's generators are: those of the host and of the model's device."""
        states, device = [torch.get_rng_state()], next(self.layers[-1][-1].parameters()).device
        return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _handing_on(layer: nn.Module, output: Any) -> Iterator[None]:
    """While this lasts the layer hands ``output`` on; what it had for a forward method of its own comes back."""
    own = vars(layer).get("forward")
    layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _sharing_forward(layer: nn.Module, session: Session, number: int, last: bool) -> Callable[..., Any]:
    """A shared layer's forward in compiled code; bound, so that a deep copy of the layer gets one of its own."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stack_pass = session.prepared_pass(number) if self is layer else None
        if stack_pass is None:
            return type(self).forward(self, *args, **kwargs)
        if stack_pass.handed is not None:
            return stack_pass.handed
        output = type(self).forward(self, *args, **kwargs)
        if last and torch.is_grad_enabled():
            stack_pass.left = _detached(output)
        return output

    return MethodType(forward, layer)


def _equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(_detached(part) for part in output) if isinstance(output, tuple) else output


def _obstacle(handle: Handle) -> str | None:
    """Why the passes of this model differ from the start, or its layers cannot be skipped; ``None`` if they can."""
    part = handle.config.consistency
    if part is None or part.gradient == "both":
        return "there is one pass"
    if handle.stock.live or handle.adapter_dropout:
        return "torch's own dropout draws anew in every pass"
    for stack in handle.stacks:
        if stack.spec.shared:
            return f"the layers of {type(stack.module).__name__} are one module"
        if getattr(stack.module, "layerdrop", 0):
            return "LayerDrop skips other layers in every pass"
        if any("forward" in vars(layer) for layer in stack.layer_modules):
            return "another library has replaced the forward code of a layer"
    return None


def _common(stacks: list[Stack]) -> list[list[nn.Module]]:
    """Each stack's layers below its first dropping one; behind a stack that drops nothing is common."""
    found = []
    for stack in stacks:
        depths = [0 if site.kind == "input" else depth for site in stack.sites for depth in site.drops]
        below = min(depths, default=stack.depths)
        if below:
            found.append(stack.layer_modules[:below])
        if depths:
            break
    return found
