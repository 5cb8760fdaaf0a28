"""``hiddenkey doctor``: what is installed, what the machine offers, and what can be done with a model."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("hiddenkey_rs", "numpy", "torch", "transformers", "peft", "accelerate", "datasets", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An optional model."""
    parser.add_argument("--model", help="a folder, a hub name, minilm or gpt2-tiny")


def main(options: argparse.Namespace) -> int:
    """Print the findings."""
    for name, value in machine().items():
        print(f"{name:<14}{value}")
    if options.model is not None:
        print(model(options.model))
    return 0


def machine() -> dict[str, str]:
    """Versions, processor and accelerator, as people read them."""
    import torch

    from ..masks import engine

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["processor"] = f"{platform.machine()}, {os.cpu_count()} core(s), {torch.get_num_threads()} torch thread(s)"
    made = engine()
    found["mask path"] = f"{made['simd']}, {made['build']} build"
    found["stream"] = made["stream"]
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "not available"
    return found


def model(name: str) -> str:
    """What the model's family supports, which layers HiddenKey reaches, and which dropouts of its own are live."""
    from ..attachment import attach, live_dropouts
    from ..config import HiddenKeyConfig
    from ..errors import UnsupportedModelError
    from ..experiments.models import load_model, quiet_libraries
    from ..experiments.tasks import TASKS

    quiet_libraries()
    loaded: Any = load_model(name, TASKS["e2e" if name == "gpt2-tiny" else "mrpc"], seed=0)[0]
    lines = [f"\nmodel         {type(loaded).__name__}, family {loaded.config.model_type}"]
    live: dict[tuple[str, float], int] = {}
    for path, _, attribute, rate in live_dropouts(loaded):
        key = (path.rpartition(".")[2] if attribute == "p" else attribute, rate)
        live[key] = live.get(key, 0) + 1
    own = ", ".join(f"{count} x {place} {rate:g}" for (place, rate), count in live.items())
    lines.append(f"own dropout   {own or 'none'}")
    try:
        handle = attach(loaded, HiddenKeyConfig(), stock_dropout="off")
    except UnsupportedModelError as error:
        return "\n".join([*lines, f"supported     no: {error}"])
    lines.append("supported     yes; HiddenKey would drop at")
    lines.append(str(handle.report()))
    handle.detach()
    return "\n".join(lines)
