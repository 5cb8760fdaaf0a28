"""What a checkpoint must hold before training goes on from it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import HiddenKeyConfig
from ..errors import StateError
from ..serialise import CONFIG_NAME
from .stream import SAMPLER_NAME

DATA_NAME = "hiddenkey_data.json"
"""In a checkpoint of the stock loader: what its order was of. (Ours keeps that with its own state.)"""

# FSDP writes the optimizer's state under other names.
_STATE = {
    "trainer_state.json": "trainer_state.json",
    "optimizer.pt": "optimizer*",
    "scheduler.pt": "scheduler.pt",
    "rng_state.pth": "rng_state*.pth",
    CONFIG_NAME: CONFIG_NAME,
}


def checked_checkpoint(
    checkpoint: str | os.PathLike[str] | bool, output_dir: str, config: HiddenKeyConfig, streamed: bool = False
) -> str:
    """The checkpoint's folder (``True``: the last whole one of ``output_dir``), once it is known to match.

    Args:
        checkpoint, output_dir: as the Trainer's. config: what will be dropped.
        streamed: whether batches will be those of our loader.

    Raises:
        StateError: no checkpoint, state missing, another config or another loader: going on would silently train
            something else.
    """
    folder = _last_whole(output_dir) if isinstance(checkpoint, bool) else Path(checkpoint)
    missing = _missing(folder)
    known = (folder / SAMPLER_NAME).is_file()
    if known and not streamed:
        raise StateError(
            f"the checkpoint was trained with loader='hiddenkey' (got {str(folder)!r} with {SAMPLER_NAME}); resume with it"
        )
    if streamed and not known:
        missing.append(SAMPLER_NAME)
    if missing:
        raise StateError(
            f"the checkpoint lacks state (got {str(folder)!r} without {', '.join(missing)}); "
            "resume from a folder that the trainer saved whole, with the same loader"
        )
    saved = HiddenKeyConfig.from_pretrained(folder)
    if saved != config:
        changed = [name for name, value in config.to_dict().items() if saved.to_dict()[name] != value]
        raise StateError(
            f"the checkpoint was trained with another config (got {changed[0]}={saved.to_dict()[changed[0]]!r} there and "
            f"{config.to_dict()[changed[0]]!r} here); resume with the saved one"
        )
    return str(folder)


def _missing(folder: Path) -> list[str]:
    found = [name for name, pattern in _STATE.items() if not any(folder.glob(pattern))]
    state = "trainer_state.json"
    if state not in found:
        try:  # transformers writes it last, and in its place
            json.loads((folder / state).read_text(encoding="utf-8"))
        except ValueError:
            found.append(f"a whole {state}")
    return found


def _last_whole(output_dir: str) -> Path:
    """The last checkpoint with all its state: training may have been killed while it wrote one. Without any, the last."""
    steps = {path: path.name.rpartition("-")[2] for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    found = sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: -int(steps[path]))
    if not found:
        raise StateError(f"there is no checkpoint to resume from (got {output_dir!r}); train without resuming first")
    whole = next((path for path in found if not _missing(path)), found[0])
    if whole != found[0]:
        warnings.warn(
            f"the last checkpoint was not written to its end (got {str(found[0])!r} without "
            f"{', '.join(_missing(found[0]))}); going on from {whole.name}",
            stacklevel=4,
        )
    return whole


def save_data(folder: str, parts: Mapping[str, str]) -> None:
    """Leave in a checkpoint what training went over."""
    Path(folder, DATA_NAME).write_text(json.dumps(dict(parts)) + "\n", encoding="utf-8")


def check_data(folder: str, parts: Mapping[str, str]) -> None:
    """A :class:`StateError` if a checkpoint's training went over other data, or in another order or other steps."""
    file = Path(folder, DATA_NAME)
    try:
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise StateError(f"a checkpoint's file is damaged (got {str(file)!r}: {error}); use another one") from None
    changed = next((name for name, value in parts.items() if saved.get(name, value) != value), None)
    if changed is not None:
        raise StateError(
            f"the checkpoint was trained with another {changed} (got {saved[changed]} there and {parts[changed]} here), so that "
            "going on would train something else; give what it was trained with, or train anew"
        )


def check_place(folder: str, epoch: float, drawn: str) -> None:
    """A :class:`StateError` inside an epoch but the first of rows that are ``drawn`` from torch's global generator.

    transformers draws their order from the generator that the epochs before have used, and draws it anew before it has put
    that generator back: other rows would be skipped than were seen.
    """
    if epoch > 1 and not epoch.is_integer():
        raise StateError(
            f"the stock loader cannot find its place among rows that are {drawn} (got {folder!r} in the middle of "
            f"epoch {int(epoch) + 1}); resume at an epoch's end, or train with loader='hiddenkey', which finds every place and "
            "sorts by length, too"
        )


def warn_about_generators(checkpoint: str, ranks: int, model_draws: bool) -> None:
    """Say that torch's own dropout will not go on where it stopped, if it will not: its state is kept by rank."""
    file = "rng_state.pth" if ranks == 1 else f"rng_state_{ranks - 1}.pth"
    same = (Path(checkpoint) / file).is_file() and not (Path(checkpoint) / f"rng_state_{ranks}.pth").is_file()
    if model_draws and not same:
        warnings.warn(
            f"the checkpoint was trained on another number of ranks (got {ranks} now), and the model's own dropout draws "
            'from a generator on each; its masks will be others. attach with stock_dropout="off" and lora_dropout=0 to '
            "make the run independent of ranks",
            stacklevel=3,
        )
