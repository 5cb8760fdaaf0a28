"""From the host's memory to a device's, without waiting for what the device is doing."""

from __future__ import annotations

import threading
from functools import cache

import torch

SMALL = 64 << 10
"""Bytes up to which the driver copies at once, whatever memory they lie in."""
LARGE = 16 << 20
"""Bytes beyond which page-locked memory is taken anew: what that costs is little then, and nothing is kept."""
_SLOTS = 8
_LEAST = 1 << 20


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host's tensor on a device.

    Example:
        >>> to_device(torch.arange(3), torch.device("cpu"))
        tensor([0, 1, 2])
    """
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.nbytes <= SMALL:
        return tensor.to(device, non_blocking=True)
    if tensor.nbytes > LARGE or not tensor.is_contiguous():
        return tensor.pin_memory().to(device, non_blocking=True)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _staging(torch.device("cuda", index)).send(tensor)


class _Staging:
    """Page-locked memory for one device, used in turn: taking it anew for every copy costs a millisecond on some machines."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock, self._turn = device, threading.Lock(), 0
        self._slots: list[tuple[torch.Tensor, torch.cuda.Event] | None] = [None] * _SLOTS

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.nbytes
        with self._lock, torch.cuda.device(self._device):
            turn, self._turn = self._turn, (self._turn + 1) % _SLOTS
            slot = self._slots[turn]
            if slot is not None:
                slot[1].synchronize()  # until the copy before has been read; eight copies ago, it has been
            if slot is None or slot[0].numel() < size:
                room = max(_LEAST, 1 << (size - 1).bit_length())
                slot = (torch.empty(room, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                self._slots[turn] = slot
            laid = slot[0][:size].view(tensor.dtype).view(tensor.shape)
            laid.copy_(tensor)
            found = laid.to(self._device, non_blocking=True)
            slot[1].record()
        return found


@cache
def _staging(device: torch.device) -> _Staging:
    return _Staging(device)
