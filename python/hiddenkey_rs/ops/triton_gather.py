"""Column and span DropKey in Triton over kept keys only: when that is possible, when it pays, and the lists it reads.

Nothing is copied: kernels load rows of keys and values through a list of positions, which is made on the device. A list has
room for all keys of a mask, 8 bytes a key and head, so that no number of kept keys has to be known on the host and none
can be too many; blocks of a list that hold nothing end at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_launch import Launch, Ready, kernels

GATHER_DROPPED = 48
"""Kept keys are visited alone where so many keys go: measured on an H100 (``benches/results/tiles_h100.jsonl``)."""
TYPICAL_RATE = 0.1
"""Stands for the rate of a mask that is given without it."""
_BLOCK = 1024
_READY = Ready()


def obstacle(keep: Tensor | None, position: str, cross: bool, causal: bool, window: int | None) -> str | None:
    """Why kept keys cannot be visited alone, or ``None`` if they can."""
    if keep is None:
        return "only the column and span patterns drop whole keys, and no keep is given"
    if position == "dropattention":
        return "DropAttention's gradient passes through dropped keys"
    if cross and (causal or window is not None):
        return "queries of cross-attention that see different keys lose them one by one, and are given them back"
    return None


def worth_gathering(keys: int, rate: float | None, causal: bool = False, window: int | None = None) -> bool:
    """Whether visiting kept keys alone is taken to be faster than masking the dropped ones: by how many keys that saves.

    Args:
        keys: of the longest document. rate: the probability of dropping; ``None``: :data:`TYPICAL_RATE`.
        causal, window: as the attention has them; a window narrows what a query visits.

    Example:
        >>> worth_gathering(2048, 0.1), worth_gathering(256, 0.1), worth_gathering(256, 0.3)
        (True, False, True)
    """
    if window is not None:
        keys = min(keys, window if causal else 2 * window - 1)
    return keys * (TYPICAL_RATE if rate is None else rate) >= GATHER_DROPPED


def kept_lists(table: Tensor, keep: Tensor, cross: bool) -> Tensor:
    """The lists of :mod:`.triton_gather_kernel`: int32 (documents, heads, 2, columns + 1).

    Args:
        table: of documents, whose keys alone are listed. keep: bool (documents, heads, columns), by position.
        cross: a head that keeps none of a document's keys lists all of them.
    """
    documents, heads, columns = keep.shape
    place = (keep.shape, keep.device, cross)
    launch: Launch | None = _READY.get(place)
    if launch is None:
        kernel, constants = kernels("gather_kernel").list_kernel, {"OWN": not cross, "BLOCK": _BLOCK}
        launch = _READY.keep(place, Launch(kernel, documents * heads, (heads, columns + 1), constants, keep.device))
    lists = torch.empty(documents, heads, 2, columns + 1, dtype=torch.int32, device=keep.device)
    launch(table.contiguous(), keep.contiguous(), lists)
    return lists
