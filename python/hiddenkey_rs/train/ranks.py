"""What the processes of one training tell each other: sums, objects, and whether they all do the same.

Everything here is a collective: every rank must come to it. With one process nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import distributed

from ..errors import DataError, HiddenKeyError, StateError

Parts = Mapping[str, str]
"""What a rank holds, by name: digests and settings as text."""


ON_ALL = "(on every rank)"


def launched() -> tuple[int, int]:
    """(rank, world size) that the launcher gave this process, by its environment; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process' number; 0 where no process group exists."""
    return distributed.get_rank() if _grouped() else 0


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _grouped() else 1


def gather(value: Any) -> list[Any]:
    """Every rank's ``value``, by rank. Values are pickled: keep them small."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def summed(values: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Sums over ranks of the numbers under each name. A rank may lack a name."""
    found: dict[str, tuple[float, ...]] = {}
    for one in gather(dict(values)):
        for name, numbers in one.items():
            found[name] = tuple(a + b for a, b in zip(found[name], numbers, strict=True)) if name in found else numbers
    return found


def wait() -> None:
    """Until every rank has come here."""
    if world_size() > 1:
        distributed.barrier()


@contextmanager
def together() -> Iterator[None]:
    """Work inside that fails on one rank fails on all of them, instead of letting the others wait.

    Raises:
        HiddenKeyError: the first failing rank's, of its own type, on every rank.
    """
    error: HiddenKeyError | None = None
    try:
        yield
    except HiddenKeyError as failed:
        error = failed
    found = gather(None if error is None else (type(error), str(error)))
    if error is not None:
        raise _on_all(error)
    for number, other in enumerate(found):
        if other is not None:
            kind, text = other
            raise _on_all(kind(f"on rank {number}: {text}"))


def check_same(parts: Parts) -> None:
    """Every rank holds the same run, or an error on every rank that names the first difference.

    Args:
        parts: by name; what begins with "data" is the data set's, the rest is the run's.

    Raises:
        DataError: another data set. StateError: another config, seed, weights or training arguments.
    """
    found: list[Parts] = gather(dict(parts))
    for number, other in enumerate(found):
        for name in dict.fromkeys((*found[0], *other)):
            mine, theirs = found[0].get(name, "nothing"), other.get(name, "nothing")
            if mine != theirs:
                kind, mend = (DataError, _DATA) if name.startswith("data") else (StateError, _RUN)
                raise _on_all(
                    kind(f"the ranks differ in their {name} (got {theirs} on rank {number}, {mine} on rank 0); {mend}")
                )


_DATA = "give every rank the same files, tokenised in the same way"
_RUN = "start every rank with the same arguments, files and versions"


def check_even(counts: list[int], step: int) -> None:
    """Every rank has the same number of micro-batches for a step, or a :class:`DataError`: the others would wait for ever."""
    if len(set(counts)) > 1:
        least = counts.index(min(counts))
        raise _on_all(
            DataError(
                f"the ranks have unequal numbers of micro-batches (got {counts[least]} on rank {least} and {max(counts)} "
                f"elsewhere in step {step}); use loader='hiddenkey', or let every rank's data end together"
            )
        )


def is_on_all(error: BaseException) -> bool:
    """Whether every rank raised this error, so that one of them may speak for all."""
    return ON_ALL in getattr(error, "__notes__", ())


def _on_all(error: HiddenKeyError) -> HiddenKeyError:
    error.add_note(ON_ALL)
    return error


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()
