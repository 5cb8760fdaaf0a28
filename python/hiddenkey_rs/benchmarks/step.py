"""``hiddenkey bench step``: a whole LoRA training step with each way to drop, against the step without any.

Forward, backward and AdamW of a MiniLM-size encoder and a LLaMA-type decoder with random weights. All variants of a
model take turns in one process, each with a model of its own over the same frozen weights. Before anything is timed,
losses and gradients of a small step are compared (``step_checks``).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..errors import ConfigError
from ..experiments.extras import extra
from ..experiments.models import quiet_libraries
from . import devices, machine, step_checks, step_memory, step_profile
from .attention_tables import bound
from .harness import Goal, Row, figure, summary
from .step_models import (
    ADAPTER,
    BOTH,
    COMPILED,
    DOUBLED,
    FULL,
    FULL_AGAIN,
    FULL_KERNELS,
    GRAPHS,
    MINUS,
    MINUS_KERNELS,
    MINUS_MASKS,
    NONE,
    NONE_AGAIN,
    RDROP,
    STOCK,
    Runner,
    Shape,
    Variant,
    base_model,
    variants,
)

SAMPLES = 7
_ENCODER = Shape("encoder", layers=6, hidden=384, heads=12, vocab=30522, length=128, batch=32, ffn=1536)
_DECODER = Shape("decoder", layers=12, hidden=512, heads=8, vocab=8192, length=512, batch=8)
_MOST_ROUNDS = 31
_TURN, _LONG = 5, 0.08
"""Steps of a turn on an accelerator, unless one takes so many seconds."""
_COMPARED = (
    # ours, peer, and at most so many times its time: of the encoder, of the decoder
    (MINUS, ADAPTER, 1.00, 1.00),
    (MINUS, NONE, 1.03, 1.03),
    (FULL, NONE, 1.50, 1.30),
    (MINUS_KERNELS, NONE, None, None),
    (FULL_KERNELS, NONE, None, None),
    (FULL_AGAIN, NONE_AGAIN, 1.40, 1.30),
    (RDROP, DOUBLED, 1.00, 1.00),
    (BOTH, DOUBLED, 1.00, 1.00),
    (COMPILED[2], COMPILED[1], 1.00, 1.00),
    (COMPILED[2], COMPILED[0], 1.03, 1.03),
    (COMPILED[3], COMPILED[0], 1.50, 1.30),
    (GRAPHS[2], GRAPHS[1], 1.00, 1.00),
    (GRAPHS[2], GRAPHS[0], 1.03, 1.03),
    (GRAPHS[3], GRAPHS[0], 1.50, 1.30),
    (MINUS_MASKS, NONE, None, None),
    (ADAPTER, NONE, None, None),
    (STOCK, NONE, None, None),
    (DOUBLED, NONE, None, None),
)
_MEMORY = (
    (MINUS, NONE, 1.02),
    (FULL, NONE, 1.10),
    (FULL_AGAIN, NONE_AGAIN, None),
    (BOTH, DOUBLED, None),
)


@dataclass(frozen=True)
class Sizes:
    """What is run. ``samples``: of each variant, at least."""

    shapes: tuple[Shape, ...]
    samples: int = SAMPLES
    device: str = "cpu"
    goals: bool = True
    profile: bool = False
    compiled: bool = False
    graphs: bool = False
    """CUDA graphs."""
    memory: bool = True
    times: bool = True
    budget: float = 30.0
    """Seconds of a model to spend on samples beyond the least number."""


WHOLE = Sizes((_ENCODER, _DECODER))
QUICK = Sizes(
    (
        replace(_ENCODER, layers=2, hidden=128, heads=4, vocab=1000, length=64, batch=8, ffn=512),
        replace(_DECODER, layers=4, hidden=128, heads=4, vocab=1000, length=64, batch=4),
    ),
    samples=3,
    goals=False,
    budget=3.0,
)


def adapted(options: argparse.Namespace) -> Sizes:
    """The sizes that the command line asks for.

    Raises:
        ConfigError: no such device here, or a size that no model can have.
    """
    device = devices.check(options.device)
    sizes = QUICK if options.quick else WHOLE
    if options.samples is not None and options.samples < 1:
        raise ConfigError(f"samples must be at least 1 (got {options.samples}); 7 or more make a median worth quoting")
    given = {name: getattr(options, name) for name in ("layers", "hidden", "heads", "vocab", "length", "batch")}
    given = {name: value for name, value in given.items() if value is not None}
    if "hidden" in given:
        given["ffn"] = 0
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    chosen = [shape for shape in sizes.shapes if options.models is None or shape.model in options.models]
    return replace(
        sizes,
        shapes=tuple(replace(shape, **given, dtype=dtype) for shape in chosen),
        samples=options.samples or sizes.samples,
        device=device,
        profile=options.profile,
        compiled=options.compile,
        graphs=options.compile and device != "cpu",
        memory=not options.no_memory,
        times=not options.memory_only,
    )


def run(
    sizes: Sizes, threads: Sequence[int], place: Mapping[str, Any], built: Callable[[], None] | None = None
) -> Iterator[Row]:
    """Every row; ``threads``: how many to try, on a CPU. ``built``: called when all but the timing of a model is done."""
    quiet_libraries()
    place = devices.place(place, sizes.device)
    for shape in sizes.shapes:
        for count in threads:
            with machine.using_threads(count):
                yield from _model(sizes, shape, count, place, built or (lambda: None))


def _model(sizes: Sizes, shape: Shape, threads: int, place: dict[str, Any], built: Callable[[], None]) -> Iterator[Row]:
    chosen = variants(shape, sizes.compiled, sizes.graphs, sizes.device)
    peaks = {}
    if sizes.memory and sizes.device == "cpu":  # first, while this process is small
        devices.say(f"step: {shape.label}, peak memory of {len(chosen)} variants")
        peaks = step_memory.on_cpu(shape, chosen, threads)
    base = base_model(shape, sizes.device)
    runners = {variant: Runner(shape, variant, base, sizes.device) for variant in chosen}
    devices.say(f"step: {shape.label}, {threads} thread(s), comparing losses and gradients")
    right = step_checks.passing(runners, base, sizes.device)
    timed = {variant: runner for variant, runner in runners.items() if variant in right}
    if sizes.device != "cpu":
        for runner in timed.values():
            runner.step()  # what a first step, or a graph's first runs, take
        torch.cuda.empty_cache()  # for whoever shares the device
    built()
    if sizes.memory and sizes.device != "cpu":
        measured = {variant for ours, peer, _ in _MEMORY for variant in (ours, peer)}
        peaks = step_memory.on_device({v: runner for v, runner in timed.items() if v in measured}, base)
    samples: dict[Variant, list[float]] = {}
    if sizes.times:
        devices.say(f"step: {shape.label}, {threads} thread(s), {len(timed)} variants in turn")
        samples = _alternate(timed, sizes)
    if sizes.profile:
        shown = [variant for variant in (NONE, ADAPTER, MINUS, FULL) if variant in timed]
        place = {**place, "profile": step_profile.profile({v: timed[v] for v in shown}, sizes.device)}
    decoder = shape.decoder
    for ours, peer, *limits in _COMPARED if sizes.times else ():
        if {ours, peer} <= set(chosen):
            times = [summary(samples.get(variant, []), 1e3) for variant in (ours, peer)]
            checked = {ours, peer} <= right
            limit = limits[decoder] if sizes.goals else None
            yield _row(shape, f"{ours.name}", threads, "ms", times, peer, limit, checked, place)
    for ours, peer, limit in _MEMORY:
        if {ours, peer} <= set(peaks):
            found = [step_memory.exact(peaks[variant]) for variant in (ours, peer)]
            checked = {ours, peer} <= right
            limit = limit if sizes.goals else None
            yield _row(shape, f"peak memory, {ours.name}", threads, "MiB", found, peer, limit, checked, place)


def _row(
    shape: Shape,
    case: str,
    threads: int,
    unit: str,
    figures: Sequence[Mapping[str, Any]],
    peer: Variant,
    limit: float | None,
    checked: bool,
    place: Mapping[str, Any],
) -> Row:
    ours, theirs = figures
    goal = None if limit is None else Goal("speedup", 1 / limit)
    return Row(
        "step",
        f"{shape.label}, {case}",
        asdict(shape),
        threads,
        unit,
        ours,
        {"name": peer.name, **theirs},
        goal,
        checked,
        about=place,
    )


def _alternate(runners: Mapping[Variant, Runner], sizes: Sizes) -> dict[Variant, list[float]]:
    """Seconds a step. Variants take turns, and another one begins every round.

    On an accelerator a turn is of several steps with one wait behind them, as in training: a step by itself would find all
    that the host does once a step cold, and nothing ahead of the device.
    """
    order = list(runners)
    samples: dict[Variant, list[float]] = {variant: [] for variant in order}
    turns = {}
    for variant, runner in runners.items():
        start = time.perf_counter()
        runner.step()
        devices.wait(sizes.device)
        long = time.perf_counter() - start > _LONG
        turns[variant] = 1 if sizes.device == "cpu" or long else _TURN
    end = time.perf_counter() + sizes.budget
    for number in range(max(_MOST_ROUNDS, sizes.samples)):
        if number >= sizes.samples and time.perf_counter() > end:
            break
        gc.collect()
        shift = number % max(len(order), 1)
        for variant in (*order[shift:], *order[:shift]):
            devices.wait(sizes.device)
            start = time.perf_counter()
            for _ in range(turns[variant]):
                runners[variant].step()
            devices.wait(sizes.device)
            samples[variant].append((time.perf_counter() - start) / turns[variant])
    return samples


def tables(rows: Sequence[Row]) -> list[list[dict[str, str]]]:
    """What the terminal shows: every row, then the parts of each model's step, if they were asked for."""
    found = [[_cells(row) for row in rows]]
    for label, mine in _by_model(rows).items():
        parts = mine[0].about.get("profile")
        if parts:
            found.append([{f"{label}, ms": part, **line} for part, line in parts])
    return found


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    several = len({row.threads for row in rows}) > 1
    for row in rows:
        label = Shape(**row.sizes).label
        found.setdefault(f"{label}, {row.threads} thread(s)" if several else label, []).append(row)
    return found


def _cells(row: Row) -> dict[str, str]:
    met = {None: "", True: "yes", False: "NO"}[row.met] if row.checked else "UNCHECKED"
    return {
        "case": row.case,
        "threads": str(row.threads),
        "unit": row.unit,
        "ours": figure(row.ours["median"]),
        "p10-p90": f"{figure(row.ours['p10'])}-{figure(row.ours['p90'])}",
        "n": str(row.ours["n"]),
        "peer": str(row.peer["name"]),
        "peer's": figure(row.peer["median"]),
        "of peer": "-" if row.speedup is None else f"{1 / row.speedup:.3f}",
        "goal": bound(row.goal),
        "met": met,
    }


def notes(rows: Sequence[Row]) -> list[str]:
    """The sizes, which the table leaves out."""
    return [
        f"{label}: {s['heads']} heads, FFN {s['ffn'] or 'as usual'}, vocabulary {s['vocab']}, L {s['length']}, "
        f"B {s['batch']}, {s['dtype']}"
        for label, s in ((label, mine[0].sizes) for label, mine in _by_model(rows).items())
    ]


def plot(rows: Sequence[Row], path: str) -> None:
    """The picture of ``--plot``: times of the step without dropout, a bar a variant."""
    extra("matplotlib").use("Agg")
    plt = extra("matplotlib.pyplot")
    models = _by_model(rows)
    picture, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 3.6), layout="constrained", squeeze=False)
    for (label, found), axis in zip(models.items(), axes[0], strict=True):
        mine = [row for row in found if row.unit == "ms" and row.checked]
        base = next((row.peer["median"] for row in mine if row.peer["name"] == NONE.name), None)
        times: dict[str, float] = {}
        for row in mine:
            times[row.case.removeprefix(f"{Shape(**row.sizes).label}, ")] = row.ours["median"]
            times.setdefault(row.peer["name"], row.peer["median"])
        names = sorted(times, key=lambda name: -times[name])
        colours = ["#D55E00" if name.startswith(("HiddenKey", "r-drop")) else "#0072B2" for name in names]
        axis.barh(names, [times[name] for name in names], color=colours)
        for place, name in enumerate(names):
            share = f", {times[name] / base:.2f}x" if base else ""
            axis.text(times[name], place, f" {times[name]:.3g}{share}", va="center", fontsize=8)
        axis.set_xlim(right=1.3 * max(times.values(), default=1.0))
        axis.set_xlabel(f"{label}: ms a step; times of no dropout")
        axis.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=130)
    plt.close(picture)
