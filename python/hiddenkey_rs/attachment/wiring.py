"""Whether a model still holds the modules that something was attached to: what replaced one would drop nothing, silently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..errors import StateError, UnsupportedModelError

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where what torch.compile and torch's checkpoint wrappers make of a module holds it. (An adapter's layer computes more.)"""


class Wiring:
    """The ways from a model to some of its modules, by path. A look at all of them costs microseconds.

    ``attended``: the paths of attention; ``cut``: those among ``paths`` that are told by their layer's attention what to drop.
    """

    def __init__(
        self, model: nn.Module, paths: Iterable[str], attended: Iterable[str] = (), cut: Iterable[str] = ()
    ) -> None:
        # path -> (who holds it, under which name, what). The model itself is left out: it would be kept alive.
        self._edges: dict[str, tuple[nn.Module | None, str, nn.Module]] = {}
        for path in paths:
            owner = model
            for done in _ways(path):
                name = done.rpartition(".")[2]
                held = owner.get_submodule(name)
                while name not in owner._modules:  # seen through a wrapper that was there already
                    inside = next((inner for inner in _WRAPPED if inner in owner._modules), None)
                    if inside is None:
                        raise UnsupportedModelError(
                            f"a module stands for another one that it holds elsewhere (got {type(owner).__name__} at "
                            f"{done.rpartition('.')[0]!r}); train that part by an adapter inside it, not as a whole copy"
                        )
                    owner = owner.get_submodule(inside)
                self._edges[done] = (None if owner is model else owner, name, held)
                owner = held
        shared = {done for path in attended for done in _ways(path)}
        self._alone = {done for path in cut for done in _ways(path)} - shared

    def check(self, model: nn.Module) -> None:
        """A :class:`StateError` if one of the modules was replaced. One that was compiled, or checkpoints, holds it."""
        for path, (owner, name, held) in self._edges.items():
            found = first = (model if owner is None else owner)._modules.get(name)
            while found is not None and found is not held:
                if path in self._alone and hasattr(found, "checkpoint_impl"):
                    raise StateError(
                        f"an FFN that is checkpointed by itself runs again without its layer's attention and may draw other "
                        f"masks (got {type(found).__name__} at {path!r}); checkpoint whole layers"
                    )
                found = next((found._modules[inner] for inner in _WRAPPED if inner in found._modules), None)
            if found is None:
                raise StateError(
                    f"a module was replaced after attaching, and what took its place drops nothing (got "
                    f"{type(first).__name__} at {path!r}); call detach() on the handle, change the model, and attach again"
                )


def _ways(path: str) -> Iterator[str]:
    """The path's beginnings, from the shortest: ``a``, ``a.b``, ``a.b.c``."""
    names = path.split(".") if path else []
    return (".".join(names[: end + 1]) for end in range(len(names)))
