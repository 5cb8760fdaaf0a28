"""How far gradients with dropped attention stand from those without: their mean over many masks, on one batch.

A dropout whose mean gradient differs from the plain one in direction trains towards something else, however many steps it
takes. DropAttention's denominator carries no gradient, so that a dropped key is pushed by the whole output (method: a
dropped key m of query u gets -w'_u w_m), where DropKey gives it none.

    .venv/bin/python benches/gradient_bias.py --data DIR    # the folder with WebNLG; a minute, one thread
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

import hiddenkey_rs as hk
from hiddenkey_rs.experiments.data import subset, task_splits
from hiddenkey_rs.experiments.features import collator, tokenise
from hiddenkey_rs.experiments.models import add_lora, load_model, settle
from hiddenkey_rs.experiments.provenance import commit, processor, versions
from hiddenkey_rs.experiments.tasks import TASKS

TASK, ROWS, STEPS, SEED = "webnlg-category", 48, 10, 100
PARTS = ("query", "value", "classifier")


def mean_gradients(preset: str, rate: float | None, draws: int, data: str) -> dict[str, torch.Tensor]:
    """By part of the model, the mean gradient of one batch over ``draws`` steps' masks, after some plain steps."""
    task = TASKS[TASK]
    rows = subset(task_splits(task, data).train, 200, SEED)[:ROWS]
    model, tokenizer = load_model("minilm", task, SEED, "eager")
    model = add_lora(model, task, 16, 32.0, 0.0, None, SEED).train()
    batch: dict[str, Any] = collator(tokenizer, task.kind)(tokenise(rows, task, tokenizer, 64, encoder_decoder=False))
    learning = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-3)
    plain = hk.attach(model, "none", stock_dropout="off")
    for step in range(STEPS):  # LoRA begins with B = 0, where A has no gradient
        with plain.step(step, range(len(rows))):
            plain.loss(**batch).backward()
        optimiser.step()
        optimiser.zero_grad()
    plain.detach()
    handle = hk.attach(model, hk.HiddenKeyConfig.preset(preset, rate=rate), stock_dropout="off")
    for step in range(draws):
        with handle.step(step, range(len(rows))):
            (handle.loss(**batch) / draws).backward()
    named = [(name, value.grad) for name, value in model.named_parameters() if value.grad is not None]
    return {part: torch.cat([grad.flatten() for name, grad in named if part in name]) for part in PARTS}


def main() -> None:
    """One JSON line a preset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--draws", type=int, default=24)
    options = parser.parse_args()
    settle(1, bf16=False)
    undropped = mean_gradients("none", None, 1, options.data)
    for preset in ("dropkey-column", "dropkey-element", "dropattention-column", "dropattention-element"):
        found = mean_gradients(preset, options.rate, options.draws, options.data)
        row: dict[str, Any] = {"preset": preset, "rate": options.rate, "draws": options.draws}
        for part, plain in undropped.items():
            row[f"cosine_{part}"] = round(float(torch.cosine_similarity(plain, found[part], dim=0)), 3)
            row[f"length_{part}"] = round(float(found[part].norm() / plain.norm()), 3)
        print(json.dumps({**row, "machine": processor(), "versions": versions(), "commit": commit()}))


if __name__ == "__main__":
    main()
