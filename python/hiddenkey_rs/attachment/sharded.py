"""Models whose weights are sharded over ranks (FSDP2): a head's weights outside the model's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import StateError


@contextmanager
def gathered(model: nn.Module, part: nn.Module) -> Iterator[bool]:
    """The weights of ``part`` are whole inside. Yields whether the model is sharded: every rank must then come here.

    Raises:
        StateError: the weights are sharded by something else than ``fully_shard``.
    """
    # The innermost unit around the part holds its weights.
    units: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule) and part in m.modules()]
    apart = any(isinstance(parameter, DTensor) for parameter in part.parameters())
    if apart and units:
        units[-1].unshard()
    if any(isinstance(parameter, DTensor) for parameter in part.parameters()):
        raise StateError(
            f"the head's weights are spread over ranks and cannot be gathered (got {type(part).__name__} with DTensor "
            "parameters outside fully_shard); shard the model with torch.distributed.fsdp.fully_shard"
        )
    try:
        yield bool(units)
    finally:
        if apart:
            units[-1].reshard()
