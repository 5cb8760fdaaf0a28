"""What was dropped of what could be, by site and layer.

An addition is a kernel on an accelerator, which a step with small layers waits for. So numbers are kept as they come, and added
up when somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MOST = 64
"""Numbers that are kept apart: who never asks must not collect them for ever."""


class Tally:
    """Kept and possible pairs (or places) of one site in one layer. Numbers are int64 (), on their device, or the host's."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.possible: list[Tensor] = []
        self.known = 0
        """What the host knows of the possible ones."""

    def add(self, kept: Tensor, possible: Tensor | int) -> None:
        """So many were kept of those that were possible."""
        self.kept.append(kept)
        if isinstance(possible, Tensor):
            self.possible.append(possible)
        else:
            self.known += possible
        if len(self.kept) > _MOST:
            self.kept = [_sum(self.kept)]
            self.possible = [_sum(self.possible)] if self.possible else []


def read(tallies: Sequence[Tally]) -> list[tuple[int, int]]:
    """(dropped, possible) of each. Waits for every device once."""
    parts = [part for tally in tallies for part in (tally.kept, tally.possible)]
    sums = iter(_host([_sum(part) for part in parts if part]))
    found = []
    for tally in tallies:
        kept = next(sums) if tally.kept else 0
        possible = tally.known + (next(sums) if tally.possible else 0)
        found.append((possible - kept, possible))
    return found


def _sum(numbers: Sequence[Tensor]) -> Tensor:
    return numbers[0] if len(numbers) == 1 else torch.stack(list(numbers)).sum()


def _host(numbers: Sequence[Tensor]) -> list[int]:
    devices = {number.device for number in numbers}
    found = {device: torch.stack([n for n in numbers if n.device == device]).tolist() for device in devices}
    order = {device: iter(values) for device, values in found.items()}
    return [next(order[number.device]) for number in numbers]
