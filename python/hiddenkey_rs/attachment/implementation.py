"""Which attention function a model uses, and its way back to the one it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import StateError
from .interface import IMPLEMENTATIONS, NAME, register

if TYPE_CHECKING:
    from .session import Session


def _nobody() -> None:
    """Until something is attached."""


class Implementation:
    """The attention implementation of one attached (sub)model's config.

    While attached the config says ``hiddenkey``, so that checkpoint replays during backward find it; for the length
    of an inactive forward pass (evaluation, generation) it says what it said before.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.original: str = config._attn_implementation
        self.active = False
        self.maskless = False
        """Whether attention knows by itself what may attend to what in this pass, so that no mask of pairs is to be made."""
        self.session: Callable[[], Session | None] = _nobody
        """The session that it serves, weakly: a config's way here must not keep the model alive."""
        self.packed = False
        """Whether that holds for the masks of packed rows in this pass, too: one of them was found to say the same."""

    def attach(self) -> None:
        """Point the config at our functions."""
        IMPLEMENTATIONS[id(self.config)] = self
        self.config._attn_implementation = NAME

    def begin(self, active: bool, maskless: bool = False, packed: bool = False) -> None:
        """A forward pass begins: ours if ``active``, the stock model's otherwise."""
        self._adopt()
        self.active, self.maskless, self.packed = active, maskless, packed
        self.config._attn_implementation = NAME if active else self.original

    def end(self) -> None:
        """The forward pass is over."""
        self.active = False
        self.config._attn_implementation = NAME

    def detach(self) -> None:
        """Give the config its own implementation back."""
        IMPLEMENTATIONS.pop(id(self.config), None)
        self._adopt()
        self.config._attn_implementation = self.original

    def _adopt(self) -> None:
        """What ``set_attn_implementation`` asked for meanwhile is the model's own from now on."""
        if self.config._attn_implementation != NAME:
            self.original = self.config._attn_implementation


def implementations(model: nn.Module) -> list[Implementation]:
    """One :class:`Implementation` for every distinct config of the model and its submodels."""
    register()
    # A copy of an attached model says our name, too: what it computed attention with before is not in it.
    taken = [m for m in model.modules() if getattr(getattr(m, "config", None), "_attn_implementation", None) == NAME]
    if taken:
        raise StateError(
            f"the config says {NAME!r} already (got {type(taken[0]).__name__}: a copy of an attached model, or one of two "
            'models with one config); call model.set_attn_implementation("sdpa") on a copy, give each model its own config'
        )
    configs = {
        id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    return [Implementation(config) for config in configs.values()]
