"""The loader with a state, on torchdata's: which batch was delivered last is known there, whatever was prefetched."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader

from .loader import ShardedLoader


class StatefulLoader(ShardedLoader, StatefulDataLoader):  # type: ignore[misc]
    """A :class:`ShardedLoader` that can go on where another one stopped; see :func:`build_dataloader`.

    torchdata's own state belongs to one number of workers, and to none but the same rank. Of all that it holds, a
    sampler of pure functions needs its own position alone, so that is the state here.
    """

    _iterator: Any
    use_stateful_dataloader = True
    """What ``accelerate`` asks before it saves a loader's state along with its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*set_vital.*")  # torchdata calls what torch has deprecated
            super().__init__(*args, **options)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state after the batches that were delivered; see :meth:`BatchSampler.state_dict`."""
        # torchdata does not see a sampler that was moved: it would tell of the iteration that was under way before.
        if self._iterator is None or self._iterator._finished or self.batch_sampler.placed:
            return self.batch_sampler.state_dict()
        state = super().state_dict()
        inner = state["_snapshot"]["_main_snapshot"] if "_snapshot" in state else state
        return dict(inner["_index_sampler_state"])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration begin where the state was taken.

        Raises:
            StateError: the state is damaged, or of other data, another seed or other batches.
        """
        self.batch_sampler.load_state_dict(state_dict)
        super().load_state_dict({})  # forget the iteration under way; the next one asks the sampler
