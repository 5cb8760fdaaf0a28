"""What a checkpoint must hold before training goes on from it."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..config import HiddenKeyConfig
from ..errors import StateError
from ..serialise import CONFIG_NAME

_STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def checked_checkpoint(checkpoint: str | os.PathLike[str] | bool, output_dir: str, config: HiddenKeyConfig) -> str:
    """The checkpoint's folder (``True``: the last one of ``output_dir``), once it is known to be whole and to match.

    Raises:
        StateError: no checkpoint, state missing, or another config: going on would silently train something else.
    """
    found = get_last_checkpoint(output_dir) if checkpoint is True and os.path.isdir(output_dir) else checkpoint
    if found is None or found is True:
        raise StateError(f"there is no checkpoint to resume from (got {output_dir!r}); train without resuming first")
    folder = Path(str(found))
    missing = [name for name in (*_STATE, CONFIG_NAME) if not (folder / name).is_file()]
    if not any(folder.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    if missing:
        raise StateError(
            f"the checkpoint lacks state (got {str(folder)!r} without {', '.join(missing)}); "
            "resume from a folder that the trainer saved whole"
        )
    saved = HiddenKeyConfig.from_pretrained(folder)
    if saved != config:
        changed = [name for name, value in config.to_dict().items() if saved.to_dict()[name] != value]
        raise StateError(
            f"the checkpoint was trained with another config (got {changed[0]}={saved.to_dict()[changed[0]]!r} there and "
            f"{config.to_dict()[changed[0]]!r} here); resume with the saved one"
        )
    return str(folder)
