"""Result lines: one JSON object a trial, appended as trials end, in ``results.jsonl``."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError

STATUSES = ("done", "failed")


@dataclass(frozen=True)
class ResultLine:
    """One trial's result.

    ``id``: task/method/setting/seed/stage. ``plan``: digest of its plan. ``stage``: ``search``, ``final`` or ``grid``.
    ``history``: one entry an epoch with figures of the rows fitted on (``train``), chosen on (``select``) and reported
    (``report``; a search does not look at them). ``chosen``: index of the epoch that the selection rows chose. ``examples``:
    outcomes of every reported row at the chosen and the last epoch, see :func:`per_example`. ``step``: where a loss became
    NaN, else ``None``. ``texts``: how many were generated at the chosen epoch (``groups``), of how many (``of``) of which split
    (``split``), how and how fast, the texts themselves (``hypotheses``), and which metrics are absent and why; their scores
    stand among the reported figures of that epoch. ``seconds_per_step``, ``examples_per_second``: of training alone, up to
    the last look; rows are those trained on. ``peak_rss_mb``: MiB at most; ``peak_of``: what of, see
    :class:`..memory.PeakMemory` (training alone, but for ``process``), empty in old lines, which have the peak of a process
    that ran other trials before.
    """

    id: str
    plan: str
    stage: str
    task: str
    method: str
    seed: int
    status: str
    dataset: str = ""
    train_size: int | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    error: str | None = None
    step: int | None = None
    metric: str = ""
    lower_is_better: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    chosen: int = 0
    examples: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    texts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_per_step: float | None = None
    peak_rss_mb: float | None = None
    peak_of: str = ""
    examples_per_second: float | None = None
    realised_rates: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    commit: str | None = None

    @property
    def done(self) -> bool:
        """Whether the trial ran to its end."""
        return self.status == "done"

    @property
    def diverged(self) -> bool:
        """Whether a loss became NaN: a result, too. Any other failure has no step, and a sweep tries it again."""
        return not self.done and self.step is not None

    @property
    def has_result(self) -> bool:
        """Whether running the trial again would tell nothing new."""
        return self.done or self.diverged


def pack_examples(correct: NDArray[np.bool_] | None, loss: NDArray[np.floating[Any]]) -> dict[str, str | None]:
    """Outcomes of N rows for a line: correctness as hexadecimal bits, losses as base64 of float16."""
    bits = None if correct is None else np.packbits(correct).tobytes().hex()
    most = float(np.finfo(np.float16).max)  # past it float16 is infinite, and a report could not be made any more
    halves = np.clip(loss, -most, most).astype("<f2")
    return {"correct": bits, "loss": base64.b64encode(halves.tobytes()).decode()}


def per_example(line: ResultLine, when: str) -> tuple[NDArray[np.bool_] | None, NDArray[np.float64]]:
    """(correct (N,) or None, task loss (N,)) of the reported rows, in row order, at the ``"chosen"`` or ``"last"`` epoch.

    Raises:
        DataError: the line holds none (of a failed trial), or not in the form of :func:`pack_examples`.
    """
    packed = line.examples.get(when)
    if packed is None:
        what = f"(got {line.id!r}, {line.status})"
        raise DataError(f"a result line holds no outcomes of rows {what}; run the trial again")
    try:
        loss = np.frombuffer(base64.b64decode(packed["loss"] or "", validate=True), dtype="<f2").astype(np.float64)
        if packed["correct"] is None:
            return None, loss
        bits = np.frombuffer(bytes.fromhex(packed["correct"]), dtype=np.uint8)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"outcomes of rows are spoilt (got {error} in {line.id!r}); run the trial again") from None
    if len(bits) != -(-len(loss) // 8):
        what = f"(got {len(bits)} bytes of bits and {len(loss)} losses in {line.id!r})"
        raise DataError(f"outcomes of rows do not fit each other {what}; run the trial again")
    return np.unpackbits(bits, count=len(loss)).astype(bool), loss


def append_line(path: str | Path, line: ResultLine) -> None:
    """Add a line: one write, so that a kill leaves whole lines and at most one torn one at the end."""
    text = json.dumps(asdict(line), separators=(",", ":")) + "\n"
    with Path(path).open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # torn by a kill: what follows starts a line of its own
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[ResultLine]:
    """The lines of a file; of equal ids the last counts. Torn lines are left out, with a notice on standard error.

    Raises:
        DataError: no such file, or a line that is no result line; with its number.
    """
    return list(numbered_lines(path).values())


def numbered_lines(path: str | Path) -> dict[int, ResultLine]:
    """The lines of a file by their numbers, as :func:`read_lines`: what is wrong with a result can be said with its place."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"there are no results (got {str(file)!r}); run hiddenkey sweep first")
    rows = file.read_text(encoding="utf-8", errors="replace").split("\n")
    found: dict[str, tuple[int, ResultLine]] = {}
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            line = _line(json.loads(row))
        except json.JSONDecodeError:
            # Torn by a kill: the start of a line, with nothing behind it or the line of a later trial.
            if number == len(rows) or row[:6] == '{"id":'[: len(row)]:
                print(f"{file}: line {number} is torn; its trial will run again", file=sys.stderr)
                continue
            raise DataError(f"a result is no JSON (got {str(file)!r}, line {number}); remove the line") from None
        except (TypeError, ValueError) as error:
            raise DataError(f"a line is no result (got {str(file)!r}, line {number}: {error}); remove it") from None
        found[line.id] = number, line
    return dict(found.values())


def _line(values: Any) -> ResultLine:
    if not isinstance(values, dict):
        raise TypeError(f"{type(values).__name__}, no object")
    known = {f.name for f in fields(ResultLine)}
    needed = {f.name for f in fields(ResultLine) if f.default is MISSING and f.default_factory is MISSING}
    missing, unknown = sorted(needed - set(values)), sorted(set(values) - known)
    if missing or unknown:
        raise ValueError(f"lacks {missing}" if missing else f"unknown fields {unknown}")
    line = ResultLine(**values)
    if line.status not in STATUSES:
        raise ValueError(f"status {line.status!r}")
    if not isinstance(line.history, list) or not all(isinstance(entry, dict) for entry in line.history):
        raise ValueError("history is no list of objects")
    if line.status == "done" and line.chosen not in range(len(line.history)):
        raise ValueError(f"epoch {line.chosen!r} is chosen of {len(line.history)}")
    return line
