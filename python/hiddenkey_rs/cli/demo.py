"""``hiddenkey demo``: plain LoRA, LoRA with ``lora_dropout`` and LoRA with HiddenKey on the same generated data."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import StateError

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"preset": "none"},
    "LoRA + lora_dropout .1": {"preset": "none", "lora_dropout": 0.1},
    "LoRA + HiddenKey": {"preset": "hiddenkey"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write, and the choices that change what is compared."""
    parser.add_argument(
        "--out", default="runs/demo", help="folder of the three runs and the picture (default: runs/demo)"
    )
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training set (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of data order, new weights and masks (default: 0)")


def main(options: argparse.Namespace) -> int:
    """Three runs, one table, one picture. Prints whatever comes out."""
    from ..experiments.folder import CONFIG, METRICS
    from ..experiments.report import curves, table
    from ..experiments.run import run
    from ..experiments.run_config import RunConfig

    out = Path(options.out)
    base = RunConfig(
        model="minilm", task="demo", rank=16, lr=1e-3, epochs=options.epochs, seed=options.seed, train_eval_rows=256
    )
    rows, histories = [], {}
    for name, choices in METHODS.items():
        folder = out / name.lower().replace(" ", "-").replace("+-", "")
        if _is_demo(folder / CONFIG):  # another run there is refused below
            shutil.rmtree(folder)
        print(f"{name}:", file=sys.stderr)
        metrics = run(replace(base, out=str(folder), **choices))
        histories[name] = metrics["history"]
        rows.append(_row(name, metrics))
    out.mkdir(parents=True, exist_ok=True)
    curves(histories, "accuracy", out / "curves.png", "Paraphrase pairs with noisy labels, MiniLM, LoRA rank 16")
    print(table(rows))
    print(f"one seed, 400 development pairs: a standard error of accuracy is about 0.02\npicture: {out / 'curves.png'}")
    print(f"figures: {out}/*/{METRICS}")
    return 0


def _is_demo(config: Path) -> bool:
    """Whether a folder's run is one of an earlier demo."""
    from ..experiments.folder import read_json

    try:
        choices = read_json(config).get("run")
    except (OSError, StateError):
        return False
    return isinstance(choices, dict) and choices.get("task") == "demo"


def _row(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    last = metrics["last"]
    return {
        "method": name,
        "best epoch": f"{metrics['best_epoch']:g}",
        "dev accuracy": metrics["dev"]["accuracy"],
        "last: train loss": last["train"]["loss"],
        "dev loss": last["dev"]["loss"],
        "train accuracy": last["train"]["accuracy"],
        "dev accuracy (last)": last["dev"]["accuracy"],
        "examples/s": f"{metrics['examples_per_second']:.0f}",
    }
