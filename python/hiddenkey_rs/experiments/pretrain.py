"""A small decoder from nothing, on the WebNLG training text: something to fine-tune where no pre-trained one can be had.

``python -m hiddenkey_rs.experiments.pretrain --data DIR --out FOLDER``, then ``hiddenkey train --model FOLDER``.
Stopped, the same command goes on where the last checkpoint was.

Recipe: byte-level BPE of the training text, examples as fine-tuning sees them (source, line's end, target, end of text),
packed whole into blocks, loss on every token, AdamW with a cosine schedule.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import HiddenKeyError, StateError
from . import folder
from .data import Row, task_splits
from .features import IGNORED, collator, tokenise
from .interrupts import interruptible
from .models import quiet_libraries, warn_of_bfloat16
from .outcomes import outcomes
from .provenance import processor, versions
from .small_decoder import Recipe, blocks, bpe_tokenizer, new_model, rate_at
from .tasks import TASKS

RECIPE, CHECKPOINT = "recipe.json", "pretraining.safetensors"
_TASK = TASKS["webnlg"]


def pretrain(
    recipe: Recipe,
    train: Sequence[Row],
    dev: Sequence[Row],
    out: Path,
    save_every: int = 100,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train to the end and write model, tokenizer and ``recipe.json`` to ``out``; or go on from its checkpoint.

    Args:
        recipe: what to do. train, dev: rows of a data-to-text task. out: a new folder, or a stopped run of this recipe.
        save_every: optimiser steps between checkpoints. stop_after: leave after this many steps, with a checkpoint.

    Returns:
        What ``recipe.json`` holds: recipe, parameters, tokens, seconds, and each epoch's development figures.

    Raises:
        StateError: ``out`` holds a finished model, another recipe's checkpoint, or other files.
    """
    from .watch import Progress

    warn_of_bfloat16(recipe.bf16)
    started = {"recipe": recipe.to_dict(), "text": _digest(train), "finished": False}
    tokenizer = _begin(out, started, train)
    documents = [row["input_ids"] for row in _examples(train, tokenizer, recipe)]
    model = new_model(recipe, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    optimiser = _optimiser(model, recipe)
    state = _load(out / CHECKPOINT, model, optimiser) if (out / CHECKPOINT).is_file() else _State()
    batches = _batches(documents, recipe)
    progress, clock = Progress(len(batches), state.step), _Clock(state)
    with interruptible() as check:
        while state.step < len(batches):
            check()
            batch, last = batches[state.step]
            progress.loss = _step(model, optimiser, batch, recipe, state.step / len(batches))
            state.step += 1
            if last:
                state.history.append(_figures(model, dev, tokenizer, recipe))
                progress.note(f"epoch {len(state.history)}: dev perplexity {state.history[-1]['perplexity']:.3f}")
            progress.step(state.step)
            clock.read()
            if state.step % save_every == 0 or state.step == stop_after:
                _save(out / CHECKPOINT, model, optimiser, state)
            if state.step == stop_after:
                return {**started, "step": state.step}
    _put(model.eval(), out)
    found = {**started, "finished": True, **_summary(model, documents, state)}
    folder.write_json(out / RECIPE, found)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return found


@dataclass
class _State:
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class _Clock:
    """Counts on from the seconds of a state, and writes them there."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.start = time.perf_counter() - state.seconds
        self.cpu_start = time.process_time() - state.cpu_seconds

    def read(self) -> None:
        self.state.seconds = time.perf_counter() - self.start
        self.state.cpu_seconds = time.process_time() - self.cpu_start


def _summary(model: Any, documents: Sequence[Sequence[int]], state: _State) -> dict[str, Any]:
    return {
        "parameters": sum(value.numel() for value in model.parameters()),
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "cpu_seconds": round(state.cpu_seconds, 1),
        "threads": torch.get_num_threads(),
        "machine": processor(),
        "versions": versions(("hiddenkey_rs", "torch", "transformers", "tokenizers")),
        "history": state.history,
    }


def _texts(rows: Sequence[Row]) -> list[str]:
    return [f"{row['source']}\n{row['target']}" for row in rows]


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256("\0".join(_texts(rows)).encode()).hexdigest()


def _begin(out: Path, started: dict[str, Any], train: Sequence[Row]) -> Any:
    """The tokenizer: that of the stopped run in ``out``, or a new one in a new folder."""
    import transformers

    if (out / RECIPE).is_file():
        _check_same(out, json.loads((out / RECIPE).read_text(encoding="utf-8")), started)
        if (out / CHECKPOINT).is_file():
            return transformers.AutoTokenizer.from_pretrained(out)
    elif out.exists() and (out.is_file() or any(out.iterdir())):
        raise StateError(f"the output folder holds other files (got {str(out)!r}); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    folder.write_json(out / RECIPE, started)
    tokenizer = bpe_tokenizer(_texts(train), started["recipe"]["vocabulary"])
    tokenizer.save_pretrained(out)
    return tokenizer


def _check_same(out: Path, found: dict[str, Any], started: dict[str, Any]) -> None:
    if found["finished"]:
        raise StateError(f"the decoder is finished (got {str(out)!r}); use it, or choose another --out")
    for name, value in started["recipe"].items():
        if found["recipe"].get(name) != value:
            had = found["recipe"].get(name)
            raise StateError(
                f"the stopped run made another choice (got {name}={value!r}, it has {had!r}); go on with the same flags, "
                "or choose another --out"
            )
    if found["text"] != started["text"]:
        raise StateError(
            f"the stopped run read another text (got sha256 {started['text'][:12]}, it has {found['text'][:12]}); go on "
            "with the same --data, or choose another --out"
        )


def _examples(rows: Sequence[Row], tokenizer: Any, recipe: Recipe) -> list[dict[str, Any]]:
    return tokenise(list(rows), _TASK, tokenizer, recipe.context, encoder_decoder=False)


def _optimiser(model: Any, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [value for value in model.parameters() if value.dim() > 1]
    others = [value for value in model.parameters() if value.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))


def _batches(documents: Sequence[Sequence[int]], recipe: Recipe) -> list[tuple[list[list[int]], bool]]:
    """(blocks, whether they are the epoch's last) of every step."""
    size, found = recipe.batch_size, []
    for epoch in range(recipe.epochs):
        rows = blocks(documents, recipe.context, recipe.seed, epoch)
        found += [(rows[start : start + size], start + size >= len(rows)) for start in range(0, len(rows), size)]
    return found


def _step(model: Any, optimiser: torch.optim.Optimizer, batch: list[list[int]], recipe: Recipe, place: float) -> float:
    """One optimiser step at ``place`` of the way (0..1); returns the loss."""
    for group in optimiser.param_groups:
        group["lr"] = recipe.lr * rate_at(recipe, place)
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, block in enumerate(batch):
        ids[row, : len(block)] = labels[row, : len(block)] = torch.tensor(block)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16):
        # Padding stands on the right, behind everything that carries loss: causal attention needs no mask for it.
        loss = model(input_ids=ids.to(model.device), labels=labels.to(model.device)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return float(loss.detach())


def _figures(model: Any, dev: Sequence[Row], tokenizer: Any, recipe: Recipe) -> dict[str, float]:
    """Loss, perplexity and accuracy of the target tokens of the development rows."""
    found = outcomes(model, _examples(dev, tokenizer, recipe), _TASK, collator(tokenizer, "lm"), 64, bf16=recipe.bf16)
    return {name: round(value, 5) for name, value in found.figures(_TASK).items()}


def _save(path: Path, model: Any, optimiser: torch.optim.Optimizer, state: _State) -> None:
    """One file, put in place as a whole."""
    from safetensors.torch import save_file

    tensors = {}
    for name, value in model.named_parameters():
        tensors[f"model.{name}"] = value.detach()
        for key, moment in optimiser.state[value].items():
            tensors[f"{key}.{name}"] = moment
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, {"state": json.dumps(vars(state))})
    temporary.replace(path)


def _put(model: Any, out: Path) -> None:
    """The finished model's files, the weights last: who finds those may use the folder."""
    fresh = out / ".new"
    model.save_pretrained(fresh)
    for file in sorted(fresh.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        file.replace(out / file.name)
    fresh.rmdir()


def _load(path: Path, model: Any, optimiser: torch.optim.Optimizer) -> _State:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name, value in model.named_parameters():
            value.data.copy_(file.get_tensor(f"model.{name}"))
            optimiser.state[value] = {
                key: file.get_tensor(f"{key}.{name}").to(value.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return _State(**json.loads(file.metadata()["state"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("python -m hiddenkey_rs.experiments.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="folder that holds WebNLG")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the model goes")
    for item in fields(Recipe):
        default: Any = item.default
        shape: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(default, bool)
            else {"type": type(default), "metavar": item.name.upper()}
        )
        text = f"{item.metadata['help']} (default: {default})"
        parser.add_argument(f"--{item.name.replace('_', '-')}", default=default, help=text, **shape)
    options = vars(parser.parse_args(arguments))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it talks of kernels it lacks
    quiet_libraries()
    try:
        recipe = Recipe(**{item.name: options[item.name] for item in fields(Recipe)})
        splits = task_splits(_TASK, options["data"])
        found = pretrain(recipe, splits.train, splits.dev, Path(options["out"]))
    except HiddenKeyError as error:
        sys.stderr.write(f"pretrain: error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("pretrain: interrupted; the same command goes on\n")
        return 130
    last = found["history"][-1]
    size, seconds = found["parameters"] / 1e6, found["seconds"]
    sys.stderr.write(f"{size:.1f} M parameters, {seconds:.0f} s, development perplexity {last['perplexity']:.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
