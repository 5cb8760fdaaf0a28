"""Which samples make a step, and how a step is shared out: windows -> global batches -> micro-batches of ranks.

A global batch is the samples of one optimiser step, over all ranks and micro-batches. It is a function of the data set's
lengths, the seed, the epoch and the sizes asked for; ranks only share it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import ConfigError, DataError
from .checks import check_integer, contiguous, room
from .order import MAX_SEED, MAX_SIZE, Order

Tail = Literal["pad", "drop"]
MAX_WINDOW = 1 << 26
MAX_BATCH = 1 << 31
MAX_TOKENS = 1 << 62
MAX_RANKS = 1 << 20
MAX_PARTS = 1 << 24
MAX_LENGTH = (1 << 31) - 1
_MEGA = 50
"""Batches of a window by default, as of a mega-batch of transformers. Cut by tokens, that leaves 2 to 3 % of the tokens of MRPC
and SST-2 as padding in one micro-batch a step. A shorter window pads more, in inverse proportion; a longer one mixes less."""


class Batches:
    """The global batches of one window: a sequence of int64 arrays of sample numbers, each by falling length."""

    def __init__(self, samples: NDArray[np.int64], ends: list[int], lengths: NDArray[np.uint32]) -> None:
        self._samples, self._ends, self._lengths = samples, ends, lengths

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        start = self._ends[number - 1] if number else 0
        return self._samples[start : self._ends[number]]

    def bounds(self, number: int, ranks: int, micro: int) -> NDArray[np.int64]:
        """(ranks, micro, 2): where every rank's micro-batches begin and end in the batch; equal where no row is left."""
        bounds = np.empty((ranks, micro, 2), np.int64)
        _core.share(self[number], self._lengths, bounds)
        return bounds

    def share(self, number: int, ranks: int, micro: int, rank: int) -> list[NDArray[np.int64]]:
        """One rank's ``micro`` micro-batches of a batch; some are empty if the batch has fewer rows than parts."""
        rows = self[number]
        return [rows[start:end] for start, end in self.bounds(number, ranks, micro)[rank].tolist()]


class PlainBatch:
    """The one global batch of a window where nothing is known of lengths: consecutive positions, made when asked for."""

    def __init__(self, order: Order | None, start: int, stop: int) -> None:
        self._order, self._start, self._stop = order, start, stop

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        return self._rows(self._start, self._stop)

    def share(self, number: int, ranks: int, micro: int, rank: int) -> list[NDArray[np.int64]]:
        """As :meth:`Batches.share`: equal numbers of rows, one more where they do not divide."""
        size = self._stop - self._start
        first, last = (self._start + place * size // ranks for place in (rank, rank + 1))
        rows = self._rows(first, last)
        cuts = [place * len(rows) // micro for place in range(micro + 1)]
        return [rows[start:end] for start, end in pairwise(cuts)]

    def _rows(self, start: int, stop: int) -> NDArray[np.int64]:
        if self._order is not None:
            return self._order.slice(start, stop)
        rows = room(stop - start)
        rows[:] = np.arange(start, stop)
        return rows


@dataclass(frozen=True, eq=False)
class Schedule:
    """The global batches of every epoch of a data set.

    The epoch's order (:class:`Order`, or as stored without ``shuffle``) is cut into windows of ``window`` positions. A
    window's samples are sorted by length and cut into batches: of ``batch_size`` samples, or of at most ``token_budget``
    padded tokens (rows times the longest), as few and as even as they can be. The batches then run in an order that is
    drawn for the window. The epoch's last batch holds the ``size % batch_size`` samples that are left over, of any length;
    those that ``drop`` leaves out instead are the last positions of the order.

    Attributes:
        size: samples, 1 <= size <= 2**62.
        lengths: (size,) uint32, the samples' tokens; None: unknown, so that nothing is sorted.
        batch_size, token_budget: one of the two; the other is None.
        window: positions of a window; of equal batches a whole number of them.
        tail: ``pad`` keeps an incomplete last batch, ``drop`` leaves it out.
        shuffle, seed: whether and how order and batches are drawn.

    Example:
        >>> schedule = Schedule.of(8, batch_size=4, seed=1)
        >>> schedule.steps(epoch=0), sorted(np.concatenate([schedule.batch(0, 0), schedule.batch(0, 1)]).tolist())
        (2, [0, 1, 2, 3, 4, 5, 6, 7])
    """

    size: int
    lengths: NDArray[np.uint32] | None
    batch_size: int | None
    token_budget: int | None
    window: int
    tail: Tail
    shuffle: bool
    seed: int
    _ends: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        data: Any,
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        window: int | None = None,
        tail: Tail = "pad",
        shuffle: bool = True,
        seed: int = 0,
    ) -> Schedule:
        """The schedule of a data set: lengths, something with ``lengths``, or a number of samples.

        Raises:
            ConfigError: an argument out of its range, none or both of ``batch_size`` and ``token_budget``, a window
                that is no multiple of ``batch_size``, nothing left after ``tail="drop"``.
            DataError: no samples, lengths that are not integers in range, a sample longer than ``token_budget``.
        """
        size, lengths = read_data(data)
        if (batch_size is None) == (token_budget is None):
            raise ConfigError(
                f"a batch has a size in samples or in tokens (got batch_size={batch_size!r}, "
                f"token_budget={token_budget!r}); give one of the two"
            )
        if tail not in ("pad", "drop"):
            raise ConfigError(f"unknown tail (got {tail!r}); use pad or drop")
        if not isinstance(shuffle, (bool, np.bool_)):
            raise ConfigError(f"shuffle must be true or false (got {shuffle!r}); pass a bool")
        check_integer(seed, "seed", 0, MAX_SEED, "it is a 64-bit number")
        if batch_size is not None:
            most = MAX_BATCH if lengths is None else MAX_WINDOW
            batch_size = check_integer(
                batch_size, "batch_size", 1, most, "it counts the samples of a step of all ranks"
            )
            if tail == "drop" and size < batch_size:
                raise ConfigError(
                    f"tail='drop' would leave no batch (got {size} samples for batch_size={batch_size}); use tail='pad', "
                    "or a smaller batch_size"
                )
        else:
            token_budget = _checked_budget(token_budget, lengths)
        window = _checked_window(window, size, lengths, batch_size, token_budget)
        return cls(size, lengths, batch_size, token_budget, window, tail, bool(shuffle), int(seed))

    @property
    def used(self) -> int:
        """How many samples an epoch has: all, or a whole number of batches."""
        return self.size - self.size % self.batch_size if self.batch_size and self.tail == "drop" else self.size

    @property
    def windows(self) -> int:
        """How many windows an epoch has."""
        return -(-self.used // self.window)

    def steps(self, epoch: int) -> int:
        """How many global batches an epoch has. By tokens it depends on the epoch, and all lengths are looked at."""
        return int(self._counted(epoch)[-1]) if self.batch_size is None else -(-self.used // self.batch_size)

    def place(self, epoch: int, step: int) -> tuple[int, int]:
        """The window of a step, and the batch's number in it. ``step`` is in 0..steps-1."""
        if self.batch_size is not None:
            return divmod(step, self.window // self.batch_size)
        ends = self._counted(epoch)
        window = int(np.searchsorted(ends, step, side="right"))
        return window, step - (int(ends[window - 1]) if window else 0)

    def batches(self, epoch: int, window: int) -> Batches | PlainBatch:
        """The batches of a window, in 0..windows-1."""
        start = window * self.window
        stop = min(start + self.window, self.used)
        if self.lengths is None:
            order = Order(self.seed, epoch, self.size) if self.shuffle else None
            return PlainBatch(order, start, stop)
        samples, ends = room(stop - start), room(stop - start)
        count = _core.schedule(*self._arguments(epoch), self.lengths, window, samples, ends)
        return Batches(samples, ends[:count].tolist(), self.lengths)

    def batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """The samples of a step in 0..steps-1, int64, by falling length if lengths are known."""
        window, number = self.place(epoch, step)
        return self.batches(epoch, window)[number]

    def _arguments(self, epoch: int) -> tuple[tuple[int, int, bool], tuple[int, int, int, int]]:
        sizes = (self.used, self.window, self.batch_size or 0, self.token_budget or 0)
        return (self.seed, epoch, self.shuffle), sizes

    def _counted(self, epoch: int) -> NDArray[np.int64]:
        """Where each window's batches end in the epoch; kept for the latest epoch."""
        if self.lengths is not None and epoch not in self._ends:
            counts = room(self.windows)
            _core.schedule_counts(*self._arguments(epoch), self.lengths, counts)
            self._ends.clear()
            self._ends[epoch] = np.cumsum(counts)
        return self._ends[epoch]


def read_data(data: Any) -> tuple[int, NDArray[np.uint32] | None]:
    """(samples, lengths or None) of what a user calls data: a number, lengths, or something that has ``lengths``."""
    if isinstance(data, (int, np.integer)) and not isinstance(data, bool):
        if data == 0:
            raise DataError("an epoch has at least one sample (got 0); check that the data set was read")
        return check_integer(data, "the number of samples", 1, MAX_SIZE, "pass lengths, or how many there are"), None
    lengths = getattr(data, "lengths", data)
    if not isinstance(lengths, (list, tuple)) and not hasattr(lengths, "__array__"):
        raise ConfigError(
            f"data must be lengths, something with lengths, or a number of samples (got {type(data).__name__}); pass a "
            "TokenStore, an array of lengths or len(data)"
        )
    try:
        array = np.asarray(lengths)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(f"lengths must be an array of integers (got no array: {error}); convert them") from None
    checked = _checked_lengths(array)
    return len(checked), checked


def _checked_lengths(array: NDArray[Any]) -> NDArray[np.uint32]:
    if array.ndim == 1 and array.size == 0:
        raise DataError("an epoch has at least one sample (got 0 lengths); check that the data set was read")
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DataError(
            f"lengths must be a one-dimensional array of integers (got {array.dtype} of shape {array.shape}); convert them"
        )
    for worst in (int(array.argmin()), int(array.argmax())):
        if not 0 <= int(array[worst]) <= MAX_LENGTH:
            raise DataError(
                f"a length must lie in 0..={MAX_LENGTH} (got {array[worst]} of sample {worst}); mend the data"
            )
    if array.dtype == np.int32:
        array = array.view(np.uint32)
    return contiguous(array, np.uint32)


def _checked_budget(budget: Any, lengths: NDArray[np.uint32] | None) -> int:
    budget = check_integer(budget, "token_budget", 1, MAX_TOKENS, "it counts the padded tokens of a step of all ranks")
    if lengths is None:
        raise ConfigError(f"token_budget needs lengths (got {budget} and a number of samples); pass the lengths")
    longest = int(lengths.argmax())
    if lengths[longest] > budget:
        raise DataError(
            f"a sample is longer than the token budget (got {lengths[longest]} tokens of sample {longest} for {budget}); "
            "raise token_budget, or shorten the sample"
        )
    return budget


def _checked_window(
    window: Any, size: int, lengths: NDArray[np.uint32] | None, batch_size: int | None, token_budget: int | None
) -> int:
    if window is not None:
        window = check_integer(window, "window", 1, MAX_WINDOW, "it counts the samples that are sorted together")
    if lengths is None:
        return batch_size or 1
    if window is None:
        return _rows_window(size, batch_size) if batch_size else _tokens_window(lengths, token_budget or 1)
    if batch_size is not None and window % batch_size:
        near = max(1, round(window / batch_size)) * batch_size
        raise ConfigError(f"window must be a multiple of batch_size={batch_size} (got {window}); use {near}")
    return window


def _rows_window(size: int, batch_size: int) -> int:
    """About so many batches as a mega-batch of transformers has, and all windows alike: a short one would pad more."""
    batches = -(-size // batch_size)
    wanted = min(_MEGA, max(1, size // (4 * batch_size)))
    windows = max(1, (2 * batches + wanted) // (2 * wanted))
    return min(-(-batches // windows), MAX_WINDOW // batch_size) * batch_size


def _tokens_window(lengths: NDArray[np.uint32], token_budget: int) -> int:
    """As many equal windows as leave each the batches that it needs; fewer batches than that are one window."""
    rows = -(-token_budget * len(lengths) // max(1, int(lengths.sum(dtype=np.int64))))
    windows = max(1, len(lengths) // (_MEGA * rows), -(-len(lengths) // MAX_WINDOW))
    return -(-len(lengths) // windows)
