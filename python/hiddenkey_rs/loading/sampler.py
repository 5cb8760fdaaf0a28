"""The sampler: every rank's micro-batches, step by step, from a position that is a few integers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..batches.checks import check_integer
from ..batches.order import MAX_EPOCH, STREAM
from ..batches.schedule import MAX_PARTS, MAX_RANKS, Schedule, Tail
from ..errors import ConfigError, StateError

STATE_VERSION = 1


class Rows(list[int]):
    """The sample numbers of one micro-batch, or ``[-1]``: one padding row, where a batch has no row for this rank.

    Attributes:
        epoch: the epoch.
        step: global batches before this one in the epoch.
        micro: the micro-batch's number within the step, 0..accumulation-1.
    """

    __slots__ = ("epoch", "micro", "step")

    def __init__(self, rows: Iterable[int], epoch: int, step: int, micro: int) -> None:
        super().__init__(rows)
        self.epoch, self.step, self.micro = epoch, step, micro


class Position(NamedTuple):
    """So many whole global batches of an epoch are behind; the next one is ``batch`` of ``window``."""

    epoch: int
    step: int = 0
    window: int = 0
    batch: int = 0


class Cursor:
    """How far one iterator has come.

    Attributes:
        ahead: whether the iterator runs ahead of who uses its rows, who then says :meth:`BatchSampler.finish`.
        placed: there is no iterator: the sampler was put there.
    """

    def __init__(self, position: Position, ahead: bool = False, placed: bool = False) -> None:
        self.position, self.ahead, self.placed = position, ahead, placed


class BatchSampler:
    """Micro-batches of sample numbers for one rank; the global batches do not depend on who shares them.

    An iterable of :class:`Rows` for ``DataLoader(batch_sampler=...)``. An iteration begins where the sampler stands: at
    the start of its epoch, or where :meth:`seek` or :meth:`load_state_dict` put it. When one is exhausted the next one is
    the next epoch; broken off, the next one begins at the same place. All ranks yield the same number of micro-batches, and
    no sample comes twice in an epoch.

    Args:
        data: a :class:`TokenStore`, anything with ``lengths``, an array of lengths (integers in 0..2**31-1), or a number
            of samples (then nothing is sorted by length).
        batch_size: samples of a step, all ranks and micro-batches together.
        token_budget: instead: the most tokens of a step, rows times the longest. Give one of the two. A micro-batch has
            about its share of it, and may have a row more.
        accumulation: micro-batches of a step on each rank.
        rank, world_size: which of how many ranks this is.
        seed: 0 <= seed < 2**64. epoch: the epoch to begin with, < 2**32.
        shuffle: False: samples in the order of the data set (sorted by length only within a window).
        window: how many consecutive samples of the epoch's order are sorted by length together; a multiple of
            ``batch_size``, at most 2**26. Default: about 50 batches, or, by tokens, at least 50, in windows of equal size.
            See :class:`~hiddenkey_rs.batches.schedule.Schedule`.
        tail: what becomes of ``size % batch_size`` samples: ``pad`` makes a smaller batch of them, ``drop`` leaves them out.

    Raises:
        ConfigError: an argument out of its range or at odds with another. DataError: no samples, lengths that are
            not integers in range, a sample longer than ``token_budget``.

    Example:
        >>> sampler = BatchSampler([5, 9, 7, 2, 4], batch_size=2, rank=0, world_size=2)
        >>> len(sampler), sampler.steps, [len(rows) for rows in sampler]
        (3, 3, [1, 1, 1])
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        window: int | None = None,
        tail: Tail = "pad",
    ) -> None:
        self.schedule = Schedule.of(
            data,
            batch_size=batch_size,
            token_budget=token_budget,
            window=window,
            tail=tail,
            shuffle=shuffle,
            seed=seed,
        )
        self.world_size = check_integer(world_size, "world_size", 1, MAX_RANKS, "it counts the processes that train")
        self.rank = check_integer(rank, "rank", 0, self.world_size - 1, "ranks count from 0 to world_size - 1")
        most = MAX_PARTS // self.world_size
        self.accumulation = check_integer(accumulation, "accumulation", 1, most, "it counts a step's micro-batches")
        if batch_size is not None and self.schedule.steps(0) > sys.maxsize // self.accumulation:
            raise ConfigError(
                f"an epoch has too many micro-batches to count (got {self.schedule.steps(0)} steps of {accumulation}); "
                "use a larger batch_size"
            )
        self._store = data if hasattr(type(data), "digest") else None
        self._start = Position(_checked_epoch(epoch))
        self._cursor = Cursor(self._start, placed=True)
        self._ahead = False

    @property
    def placed(self) -> bool:
        """Whether nobody has iterated since the sampler was made or moved: its state is where it was put."""
        return self._cursor.placed

    @property
    def epoch(self) -> int:
        """The epoch of the next iteration."""
        return self._start.epoch

    @property
    def steps(self) -> int:
        """Global batches of the epoch. With ``token_budget`` all lengths are looked at once an epoch."""
        return self.schedule.steps(self.epoch)

    def __len__(self) -> int:
        """Micro-batches of the epoch, the same on every rank."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[Rows]:
        self._cursor = Cursor(self._start, self._ahead)
        return self._walk(self._cursor)

    @contextmanager
    def running_ahead(self) -> Iterator[None]:
        """Iterators made inside run ahead of training (prefetching); whoever delivers their batches calls :meth:`finish`.

        The next epoch would else begin when a loader's workers have been told the last rows, batches before its user has
        seen them.
        """
        self._ahead = True
        try:
            yield
        finally:
            self._ahead = False

    @property
    def cursor(self) -> Cursor:
        """The latest iterator's, or where the sampler was put since."""
        return self._cursor

    def finish(self, cursor: Cursor) -> None:
        """All that the cursor's iterator gave has been used: go to the next epoch, unless the sampler was moved since."""
        if cursor is self._cursor:
            self._start = cursor.position

    def _walk(self, cursor: Cursor) -> Iterator[Rows]:
        epoch, step, first, batch = cursor.position
        for window in range(first, self.schedule.windows):
            batches = self.schedule.batches(epoch, window)
            for number in range(batch, len(batches)):
                parts = batches.share(number, self.world_size, self.accumulation, self.rank)
                for micro, part in enumerate(parts):
                    if micro + 1 == self.accumulation:
                        cursor.position = self._next(epoch, step, window, number + 1, len(batches))
                    yield Rows(part.tolist() or [-1], epoch, step, micro)
                step += 1
            batch = 0
        if not cursor.ahead:
            self.finish(cursor)

    def _next(self, epoch: int, step: int, window: int, batch: int, batches: int) -> Position:
        if batch < batches:
            return Position(epoch, step + 1, window, batch)
        if window + 1 < self.schedule.windows:
            return Position(epoch, step + 1, window + 1)
        return Position(epoch + 1)

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """The samples of a step of the epoch, all ranks and micro-batches together: int64, by falling length.

        Raises:
            ConfigError: there is no such step.
        """
        step = check_integer(step, "step", 0, self.steps - 1, "steps count from the epoch's start")
        return self.schedule.batch(self.epoch, step)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; where the sampler stands within that epoch already, it stays."""
        if _checked_epoch(epoch) != self.epoch:
            self._move(Position(int(epoch)))

    def seek(self, step: int) -> None:
        """Let the next iteration begin after so many global batches of the epoch; all of them: at the next epoch.

        Raises:
            ConfigError: the epoch has fewer.
        """
        self._move(self._at(self.epoch, step))

    def _at(self, epoch: int, step: int) -> Position:
        steps = self.schedule.steps(epoch)
        step = check_integer(step, "step", 0, steps, "steps count from the epoch's start")
        return Position(epoch, step, *self.schedule.place(epoch, step)) if step < steps else Position(epoch + 1)

    def _move(self, position: Position) -> None:
        self._start = position
        self._cursor = Cursor(position, placed=True)

    def state_dict(self, *, epoch: int | None = None, step: int | None = None) -> dict[str, Any]:
        """Where training stands, and of which batches: a few integers and short strings.

        The position counts whole global batches. By default it is how far the latest iteration has come, which with
        workers is further than training has: then say how many steps of which epoch were trained on.

        Args:
            epoch: default: the sampler's, see :attr:`epoch`.
            step: 0..steps. Default: 0 of an ``epoch`` that is given, else as far as the latest iteration has come.

        Raises:
            ConfigError: there is no such epoch or step.
        """
        position = self._cursor.position
        if step is not None or epoch is not None:
            position = self._at(self.epoch if epoch is None else _checked_epoch(epoch), 0 if step is None else step)
        return {**self._definition(), **position._asdict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where :meth:`state_dict` was taken, with any world size, rank and accumulation.

        Raises:
            StateError: the state is damaged, or of other data, another seed or other batches. Nothing was changed.
        """
        if not isinstance(state, Mapping):
            raise StateError(
                f"a sampler's state is a mapping (got {type(state).__name__}); pass what state_dict() gave"
            )
        mine = self._definition()
        if state.get("version", STATE_VERSION) == STATE_VERSION:
            odd = ", ".join(sorted(map(str, {*mine, *Position._fields}.symmetric_difference(state))))
            if odd:
                raise _damaged(f"missing or unknown: {odd}")
        for key, value in mine.items():
            if type(state[key]) is not type(value) or state[key] != value:
                raise StateError(f"a state is of other batches (got {key}={state[key]!r}, not {value!r}); {_MEND[key]}")
        self._move(self._checked(Position(*(state[key] for key in Position._fields))))

    def _checked(self, position: Position) -> Position:
        """The position, if there is such a place. By tokens its step cannot be checked without counting the epoch."""
        epoch, step, window, batch = position
        plan = self.schedule
        if not all(type(number) is int and number >= 0 for number in position):
            raise _damaged(f"{position}")
        if epoch > MAX_EPOCH or window >= plan.windows:
            raise _damaged(f"{position}, of {plan.windows} windows")
        if plan.batch_size is not None:
            good = step < plan.steps(epoch) and plan.place(epoch, step) == (window, batch)
        else:
            good = batch < len(plan.batches(epoch, window)) and window <= step - batch <= window * plan.window
        if not good:
            raise _damaged(f"{position}, where no batch begins")
        return position

    def _definition(self) -> dict[str, Any]:
        plan = self.schedule
        return {
            "version": STATE_VERSION,
            "stream": STREAM,
            "seed": plan.seed,
            "shuffle": plan.shuffle,
            "size": plan.size,
            "digest": self.digest,
            "batch_size": plan.batch_size,
            "token_budget": plan.token_budget,
            "window_size": plan.window,
            "tail": plan.tail,
        }

    @cached_property
    def digest(self) -> str:
        """What the data are known by: the store's own digest, else one of the lengths; "" of a number of samples."""
        if self._store is not None:
            return str(self._store.digest)
        lengths = self.schedule.lengths
        if lengths is None:
            return ""
        return hashlib.blake2b(lengths.astype("<u4", copy=False).data, digest_size=8).hexdigest()


_MEND = {
    "version": "load it with the release that wrote it",
    "stream": "load it with the release that wrote it",
    "seed": "pass the seed that it was trained with",
    "shuffle": "pass the same shuffle",
    "size": "pass the data that it was trained on",
    "digest": "pass the data that it was trained on",
    "batch_size": "keep the global batch: change world_size and accumulation instead",
    "token_budget": "keep the global batch: change world_size and accumulation instead",
    "window_size": "pass the same window",
    "tail": "pass the same tail",
}


def _damaged(what: str) -> StateError:
    return StateError(f"a sampler's state is damaged (got {what}); use another checkpoint")


def _checked_epoch(epoch: Any) -> int:
    return check_integer(epoch, "epoch", 0, MAX_EPOCH, "count epochs from 0")
