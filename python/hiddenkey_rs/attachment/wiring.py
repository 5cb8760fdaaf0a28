"""Whether a model still holds the modules that something was attached to: what replaced one would drop nothing, silently."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import StateError

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where what torch.compile and torch's checkpoint wrappers make of a module holds it. (An adapter's layer computes more.)"""


class Wiring:
    """The ways from a model to some of its modules, by path. A look at all of them costs microseconds."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        # path -> (who holds it, under which name, what). The model itself is left out: it would be kept alive.
        self._edges: dict[str, tuple[nn.Module | None, str, nn.Module]] = {}
        for path in paths:
            owner, done = model, ""
            for name in path.split(".") if path else ():
                held = owner.get_submodule(name)
                done = f"{done}.{name}" if done else name
                self._edges[done] = (None if owner is model else owner, name, held)
                owner = held

    def check(self, model: nn.Module) -> None:
        """A :class:`StateError` if one of the modules was replaced. One that was compiled, or checkpoints, holds it."""
        for path, (owner, name, held) in self._edges.items():
            found = first = (model if owner is None else owner)._modules.get(name)
            while found is not None and found is not held:
                found = next((found._modules[inner] for inner in _WRAPPED if inner in found._modules), None)
            if found is None:
                raise StateError(
                    f"a module was replaced after attaching, and what took its place drops nothing (got "
                    f"{type(first).__name__} at {path!r}); call detach() on the handle, change the model, and attach again"
                )
