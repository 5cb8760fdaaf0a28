"""A run's folder: what stands in it, who may write it, and writing that leaves the old file or the new one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import StateError
from .run_config import RunConfig
from .spread import Spread

CONFIG, LOG, METRICS, CURVES, ADAPTER, MASKS = (
    "config.json",
    "log.jsonl",
    "metrics.json",
    "curves.png",
    "adapter",
    "masks.jsonl",
)
LOCK = ".lock"
RUN_STATE = "run_state.json"
"""In every ``checkpoint-N``: the history of evaluations up to there."""

# Where a run lies and how it is watched may change between a run and its resumption; how it is spread, within limits.
_FREE = ("out", "threads", "log_masks", "batch_size", "accumulation", "loader")


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder, then put it in the old one's place."""
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    put_back(path)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(fresh)
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def put_back(path: Path) -> Path:
    """The folder of :func:`replace_folder`, also where a kill fell between the two renames: the new one was whole by then."""
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if not path.exists() and fresh.is_dir() and old.is_dir():
        fresh.rename(path)
    return path


@contextmanager
def locked(out: Path, other: str = "another run is at work") -> Iterator[None]:
    """Two at once would mix what they write: the second one in a folder is refused, by what ``other`` says of the first."""
    file = out / LOCK
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file since it was opened: then this lock would keep nobody out.
            if not os.path.samestat(os.fstat(lock.fileno()), os.stat(file)):
                raise BlockingIOError
        except OSError:
            raise StateError(
                f"{other} in the folder (got {str(out)!r}); wait for it, or choose another --out"
            ) from None
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def append_line(path: Path, value: Any) -> None:
    """Add one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def keep_lines_to(path: Path, step: int, evaluated: bool) -> None:
    """Drop the lines that a resumed run writes again: of steps after ``step``, and its evaluation if that was not saved."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        last = step if evaluated else step - 1
        kept = []
        for line in lines:
            try:
                found = json.loads(line)
            except json.JSONDecodeError:  # torn, by a full disk or a kill: of a step that runs again
                continue
            if found["step"] <= (last if "evaluation" in found else step):
                kept.append(line)
        write_text(path, "".join(line + "\n" for line in kept))


def check_free(out: Path) -> None:
    """A new run needs a folder that holds no other run."""
    if out.is_file():
        raise StateError(f"the output folder is a file (got {str(out)!r}); choose another --out")
    # Hidden files are a lock, and what a kill left of a file that was being written.
    if out.is_dir() and any(not file.name.startswith(".") for file in out.iterdir()):
        held = "another run" if (out / CONFIG).is_file() else "other files"
        raise StateError(
            f"the output folder holds {held} (got {str(out)!r}); choose another --out, or --resume a stopped run"
        )


def check_resumable(out: Path, config: RunConfig) -> None:
    """A stopped run of the same choices, or a :class:`StateError`."""
    if not (out / CONFIG).is_file():
        raise StateError(f"there is no run to resume (got {str(out)!r} without {CONFIG}); train without --resume first")
    if (out / METRICS).is_file():
        raise StateError(f"the run is finished (got {str(out)!r} with {METRICS}); there is nothing to resume")
    if last_checkpoint(out) is None:
        raise StateError(
            f"the run stopped before its first checkpoint (got {str(out)!r}); remove the folder and train anew"
        )
    check_choices(out, config)


def check_choices(out: Path, config: RunConfig) -> None:
    """The run in the folder was started with these choices, or a :class:`StateError`."""
    saved, wanted = load_config(out).to_dict(), config.to_dict()
    changed = [name for name in wanted if name not in _FREE and saved[name] != wanted[name]]
    if changed:
        name = changed[0]
        raise StateError(
            f"the stopped run made another choice (got {name}={wanted[name]!r}, the run has {saved[name]!r}); "
            "resume with the same flags"
        )


def was_started(out: Path) -> bool:
    """Whether the folder holds a run."""
    return (out / CONFIG).is_file()


def load_metrics(out: Path, config: RunConfig) -> dict[str, Any]:
    """What a finished run of the same choices found."""
    check_choices(out, config)
    return read_json(out / METRICS)


def last_checkpoint(out: Path) -> Path | None:
    """The last checkpoint that was written to its end: a run may be killed while it writes one."""
    whole = [path for path in out.glob("checkpoint-*") if (path / RUN_STATE).is_file()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def clear_start(out: Path) -> None:
    """Remove what a run left that was stopped before its first checkpoint."""
    for name in (CONFIG, LOG, MASKS):
        (out / name).unlink(missing_ok=True)
    for path in (*out.glob("checkpoint-*"), out / ADAPTER, *out.glob(f".{ADAPTER}.*")):
        shutil.rmtree(path, ignore_errors=True)


def load_config(out: Path) -> RunConfig:
    """The choices of the run in a folder."""
    return RunConfig.from_dict(_recorded(out)["run"])


def load_spread(out: Path) -> Spread:
    """How the run in a folder is spread over processes."""
    recorded = _recorded(out)
    return Spread.from_dict(recorded["spread"]) if "spread" in recorded else Spread.of(load_config(out), processes=1)


def _recorded(out: Path) -> dict[str, Any]:
    if not (out / CONFIG).is_file():
        raise StateError(
            f"the folder holds no run (got {str(out)!r} without {CONFIG}); give the --out of a training run"
        )
    found = read_json(out / CONFIG)
    if not isinstance(found.get("run"), dict):
        raise StateError(f"a run's file has no choices in it (got {str(out / CONFIG)!r}); use another folder")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A file that :func:`write_json` wrote, or a :class:`StateError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise StateError(f"a run's file is damaged (got {str(path)!r}: {error}); use another folder") from None
    if not isinstance(found, dict):
        raise StateError(f"a run's file is damaged (got {type(found).__name__} in {str(path)!r}); use another folder")
    return found
