"""Results of sweeps that never ran: lines with effects that are known, for tests of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hiddenkey_rs.experiments.sweep.lines import ResultLine, append_line, pack_examples
from hiddenkey_rs.experiments.sweep.plan import SEARCH, Plan, Trial
from hiddenkey_rs.experiments.sweep.reading import load_plan
from hiddenkey_rs.experiments.sweep.runner import PLAN, RESULTS

SEEDS = tuple(range(100, 112))
TEXT = """\
name: synthetic
protocol: {select_rows: 20, search_seeds: [0], final_seeds: [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111]}
base: {model: minilm, epochs: 3, rank: 16}
tasks:
  mrpc-1000: {task: mrpc, train_size: 1000}
  stsb-500: {task: stsb, train_size: 500}
methods:
  none: {preset: none, settings: [{lr: 5.0e-4}, {lr: 1.0e-3}]}
  lora-dropout: {preset: none, rate_field: lora_dropout, settings: [{lora_dropout: 0.1}, {lora_dropout: 0.2}]}
  low-rank: {preset: none, rank: 4, settings: [{lr: 5.0e-4}, {lr: 1.0e-3}]}
  dropkey-column: {preset: dropkey-column, final_seeds: 3, settings: [{rate: 0.05}, {rate: 0.1}]}
  hiddenkey: {preset: hiddenkey, settings: [{rate: 0.05}, {rate: 0.1}]}
comparisons: {baselines: [none, lora-dropout], against: [hiddenkey]}
curves:
  rates: {vary: rate, values: [0.05, 0.1, 0.2], methods: [dropkey-column, hiddenkey], tasks: [mrpc-1000], seeds: [0, 1, 2]}
  ranks: {vary: rank, values: [4, 16, 64], methods: [none, hiddenkey], tasks: [mrpc-1000], seeds: [0, 1]}
"""
TEXTS = """\
name: texts
protocol: {select_from: dev, search_seeds: [0], final_seeds: [1, 2, 3]}
base: {model: gpt2-tiny, epochs: 3}
tasks: {e2e: {task: e2e, train_size: 500}}
methods:
  plain: {preset: none, settings: [{lr: 1.0e-3}, {lr: 2.0e-3}]}
  hiddenkey: {preset: hiddenkey, settings: [{rate: 0.05}, {rate: 0.1}]}
comparisons: {baselines: [plain], against: [hiddenkey]}
"""
ROWS = 400

Gain = Mapping[str, float]
"""Method -> what it adds to the accuracy of every task."""


def synthetic(trial: Trial, plan: Plan, gain: Gain, noise: float = 0.01) -> ResultLine:
    """A run of three epochs that over-fits; the second epoch is the best. Pairs share their seed's luck."""
    task = plan.task_of(trial.task)
    shared = np.random.default_rng([trial.seed, len(trial.task)])
    own = np.random.default_rng([trial.seed, *trial.id.encode()])
    luck, added = shared.normal(0, 0.02), gain.get(trial.method, 0.0) + own.normal(0, noise)
    hard = shared.random(ROWS)
    history, packed = [], {}
    for epoch, (level, loss) in enumerate(((0.74, 0.55), (0.80, 0.5), (0.78, 0.8)), start=1):
        correct = hard < level + luck + added
        losses = np.where(correct, 0.5 * loss, 2.0 * loss) - 2 * added
        found = {"loss": float(losses.mean().round(6)), task.metric: float(correct.mean())}
        if task.kind == "classification":
            found |= {"f1": found[task.metric] + 0.05, "ece": round(0.05 * epoch - added, 6)}
        fitted = {"loss": round(0.6 - 0.15 * epoch, 6), task.metric: 0.7 + 0.09 * epoch}
        selected = {"loss": found["loss"], task.metric: level + added + 0.01 * (trial.setting.get("rate") == 0.1)}
        history.append({"epoch": epoch, "step": 32 * epoch, "train": fitted, "select": selected, "report": found})
        bits = correct if task.kind == "classification" else None
        packed["chosen" if epoch == 2 else "last"] = pack_examples(bits, losses)
    if trial.stage == SEARCH:  # which does not look at reported rows
        packed = {}
        for entry in history:
            del entry["report"]
    return ResultLine(
        id=trial.id, plan=plan.digest, stage=trial.stage, task=trial.task, method=trial.method, seed=trial.seed,
        status="done", dataset=task.name, train_size=trial.train_size, setting=dict(trial.setting), rank=trial.config.rank,
        metric=task.metric, lower_is_better=task.lower_is_better, history=history, chosen=1, examples=packed, seconds=60.0,
        seconds_per_step=0.15 if trial.method == "hiddenkey" else 0.1, peak_rss_mb=900.0, examples_per_second=320.0,
        command=f"hiddenkey sweep plan.yaml --out runs/s --only {trial.id}", versions={"torch": "2.0"},
        machine="a machine, 1 thread(s)", commit="0" * 40,
    )  # fmt: skip


def failed(line: ResultLine, step: int | None = 7) -> ResultLine:
    """The line of the same trial, had it diverged (or died, without ``step``)."""
    error = "out of memory" if step is None else f"training diverged at step {step}"
    return dataclasses.replace(line, status="failed", error=error, step=step, history=[], examples={})


def write_study(
    folder: Path,
    gain: Gain,
    text: str = TEXT,
    change: Callable[[ResultLine], ResultLine | None] = lambda line: line,
    noise: float = 0.01,
) -> Plan:
    """A folder as a finished sweep leaves it; ``change`` may replace a line, or leave it out with ``None``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_text(text)
    plan = load_plan(folder / PLAN, "data")
    winners = {(task, method): 1 for task in plan.tasks for method in plan.methods}
    for trial in [*plan.search(), *plan.final(winners), *plan.along_curves(winners)]:
        line = synthetic(trial, plan, gain, noise)
        # the search is settled in favour of the second setting, whatever the noise
        if trial.stage == "search" and trial.id.split("/")[2] == "1":
            better = -0.2 if line.lower_is_better else 0.2
            for entry in line.history:
                entry["select"] = {name: value + better for name, value in entry["select"].items()}
        kept = change(line)
        if kept is not None:
            append_line(folder / RESULTS, kept)
    return plan
