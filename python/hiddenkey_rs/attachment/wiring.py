"""Whether a model still holds the modules that something was attached to: what replaced one would drop nothing, silently."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from ..errors import StateError

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where what torch.compile and torch's checkpoint wrapper make of a module holds it. (An adapter's layer computes more.)"""


class _Edge(NamedTuple):
    """A module that another one holds under a name."""

    owner: nn.Module
    name: str
    held: nn.Module
    path: str


class Wiring:
    """The ways from a model to some of its modules, by path. A look at all of them costs microseconds."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        edges: dict[str, _Edge] = {}
        for path in paths:
            owner, done = model, ""
            for name in path.split(".") if path else ():
                held = owner.get_submodule(name)
                done = f"{done}.{name}" if done else name
                edges[done] = _Edge(owner, name, held, done)
                owner = held
        # The model's own modules are held by the hooks as well; the model is not, and would be kept alive.
        self._edges = [edge for edge in edges.values() if edge.owner is not model]
        self._first = [(edge.name, edge.held, edge.path) for edge in edges.values() if edge.owner is model]

    def check(self, model: nn.Module) -> None:
        """A :class:`StateError` if one of the modules was replaced. One that was compiled, or checkpoints, holds it."""
        for owner, name, held, path in self._edges:
            _check(owner, name, held, path)
        for name, held, path in self._first:
            _check(model, name, held, path)


def _check(owner: nn.Module, name: str, held: nn.Module, path: str) -> None:
    found = owner._modules.get(name)
    if found is not held and (found is None or not any(found._modules.get(inner) is held for inner in _WRAPPED)):
        raise StateError(
            f"a module was replaced after attaching, and what took its place drops nothing (got {type(found).__name__} at "
            f"{path!r}); call detach() on the handle, change the model, and attach again"
        )
