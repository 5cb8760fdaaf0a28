"""Memory that batches are written into: a ring of buffers, page-locked if asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..batches.checks import check_integer
from ..errors import ConfigError


class Ring:
    """``count`` buffers that take turns, each as large as the largest batch it held. 0: new memory for every batch.

    The tensors of a batch are valid until ``count`` more batches were made: who keeps batches longer, or copies them to a
    device without waiting, needs more buffers or none. Page-locked memory needs CUDA. (What is page-locked is unverified:
    nobody has run it on a CUDA device yet.)

    Raises:
        ConfigError: a count out of range; page-locked memory without CUDA.
    """

    def __init__(self, count: int, pin_memory: bool) -> None:
        self.count = check_integer(count, "buffers", 0, 1 << 10, "2 or 3 are enough to copy while the next is made")
        self.pin_memory = bool(pin_memory)
        if self.pin_memory and not torch.cuda.is_available():
            raise ConfigError("page-locked memory needs CUDA (got pin_memory=True without a device); leave it out")
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * self.count
        self._turn = 0

    def take(self, places: int) -> Tensor:
        """An int64 tensor (places,), whatever it holds.

        Raises:
            ConfigError: in a loader's worker. Tensors are moved to shared memory there, behind the ring's back.
        """
        if get_worker_info() is not None:
            raise ConfigError(
                f"a loader's workers cannot keep buffers (got buffers={self.count}, pin_memory={self.pin_memory} in one); "
                "leave both out, and give DataLoader pin_memory=True"
            )
        if not self.count:
            return self._new(places)
        self._turn = (self._turn + 1) % self.count
        if self._buffers[self._turn].numel() < places:
            self._buffers[self._turn] = self._new(places)
        return self._buffers[self._turn][:places]

    def __reduce__(self) -> tuple[Any, ...]:
        return Ring, (self.count, self.pin_memory)

    def _new(self, places: int) -> Tensor:
        return torch.empty(places, dtype=torch.int64, pin_memory=self.pin_memory)
