"""How a run is spread over processes, and what of it must stay when it goes on with another number of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import StateError
from .run_config import RunConfig


@dataclass(frozen=True)
class Spread:
    """``rows`` of an optimiser step over all ``processes`` and ``accumulation`` micro-batches; ``None``: counted in tokens."""

    processes: int
    accumulation: int
    rows: int | None
    loader: str

    @classmethod
    def of(cls, config: RunConfig, processes: int) -> Spread:
        """A new run's."""
        own = config.loader == "hiddenkey" or (config.loader == "auto" and (processes > 1 or config.token_budget))
        rows = None if config.token_budget else config.batch_size * config.accumulation * processes
        return cls(processes, config.accumulation, rows, "hiddenkey" if own else "stock")

    def again(self, config: RunConfig, saved: RunConfig, processes: int) -> Spread:
        """This run's on another number of processes: the same rows a step.

        Args:
            config: the choices to go on with. saved: those that the run was started with. processes: now.

        Raises:
            StateError: the flags ask for other rows or another loader, or the stock loader would make other batches.
        """
        if config.loader not in ("auto", self.loader):
            raise StateError(
                f"the stopped run has another loader (got --loader {config.loader}, the run has {self.loader}); leave it out"
            )
        asked, had = ((one.batch_size, one.accumulation) for one in (config, saved))
        if self.loader == "stock":
            if (processes, *asked) != (self.processes, *had):
                raise StateError(
                    f"the stock loader makes other batches for other ranks and sizes (got {processes} process(es) of "
                    f"{asked[1]} x {asked[0]} rows, the run has {self.processes} of {had[1]} x {had[0]}); go on with the "
                    "same, or train anew with --loader hiddenkey"
                )
            return self
        if self.rows is None:
            return Spread(processes, -(-self.processes * self.accumulation // processes), None, self.loader)
        rows = config.batch_size * config.accumulation * processes
        if rows == self.rows:
            return Spread(processes, config.accumulation, self.rows, self.loader)
        if asked != had:
            raise StateError(
                f"the stopped run takes steps of {self.rows} rows (got {processes} process(es) of {asked[1]} x {asked[0]} = "
                f"{rows}); leave --batch-size and --accumulation as they were: micro-batches are added as they are needed"
            )
        return Spread(processes, -(-self.rows // (config.batch_size * processes)), self.rows, self.loader)

    def to_dict(self) -> dict[str, Any]:
        """For ``config.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spread:
        """The reverse of :meth:`to_dict`."""
        return cls(**values)
