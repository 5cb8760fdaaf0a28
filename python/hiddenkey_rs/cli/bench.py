"""``hiddenkey bench``: what the library's parts cost beside what people use today, checked before it is timed."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError

BENCHES = {
    "masks": "masks, plans and dropout on hidden states, against torch's and NumPy's generators",
    "batches": "collating, packing, orders and the balance of ranks, against transformers, TRL and NumPy",
    "attention": "attention with dropped keys, forward and backward, against attention without dropout",
    "step": "a whole LoRA training step with each dropout, against the step without any",
}
ON_DEVICES = ("attention", "step")
"""Benchmarks of what a model computes. They run on a device, and with all threads unless told otherwise."""
_MOST_RANKS = 8192
"""Of a simulation, whose examples fill a few steps of so many."""
_SHAPE = {
    "layers": "layers",
    "hidden": "width of hidden states",
    "heads": "attention heads",
    "vocab": "entries of the vocabulary",
    "length": "tokens of an example",
    "batch": "examples of a step",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand a benchmark; most flags are the same."""
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, text in BENCHES.items():
        sub = benches.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        sub.add_argument("--quick", action="store_true", help="smaller sizes, some seconds; few goals apply to them")
        sub.add_argument("--json", metavar="FILE", help="append one JSON object a row")
        sub.add_argument("--plot", metavar="FILE", help="write a picture, PNG")
        if name != "batches":  # which is made on one thread, while the model has the others
            default = "all" if name in ON_DEVICES else "1, and 2 if there are"
            sub.add_argument(
                "--threads", type=int, nargs="+", metavar="N", help=f"how many threads to try (default: {default})"
            )
        if name in ON_DEVICES:
            sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    _add_step(benches.choices["step"])
    benches.choices["batches"].add_argument(
        "--simulate-ranks", type=_ranks, metavar="N,M", help="instead: how evenly so many ranks would be loaded"
    )


def _ranks(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1 or max(found) > _MOST_RANKS:
        raise argparse.ArgumentTypeError(
            f"ranks are numbers in 1..={_MOST_RANKS} with commas between (got {text!r}); try 64,1024"
        )
    return found


def _add_step(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--profile", action="store_true", help="also show which parts of the step take the time")
    sub.add_argument("--compile", action="store_true", help="also time compiled models (torch.compile)")
    memory = sub.add_mutually_exclusive_group()
    memory.add_argument("--no-memory", action="store_true", help="leave out peak memory, a process for each variant")
    memory.add_argument("--memory-only", action="store_true", help="peak memory alone, no times")
    sub.add_argument("--models", nargs="+", choices=("encoder", "decoder"), help="which models (default: both)")
    sub.add_argument("--samples", type=int, metavar="N", help="of each variant (default: 7, or 3 with --quick)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights (default: bfloat16 on CUDA only)")
    for name, text in _SHAPE.items():
        sub.add_argument(f"--{name}", type=int, metavar="N", help=f"{text}, of the models that run")


def main(options: argparse.Namespace) -> int:
    """Print the tables; 1 if a result was not found right, whether or not goals were met."""
    from ..benchmarks import harness

    bench = importlib.import_module(f"..benchmarks.{options.bench}", __package__)
    place = harness.about()
    threads = [1] if options.bench == "batches" else _threads(options.threads, options.bench in ON_DEVICES)
    check_writable(options.json)
    check_writable(options.plot, ".png")
    if options.bench in ON_DEVICES:
        rows = list(bench.run(bench.adapted(options), threads, place))
    elif getattr(options, "simulate_ranks", None):
        if options.quick:
            raise ConfigError("ranks are simulated at one size (got --quick beside --simulate-ranks); leave it out")
        rows = bench.simulate(options.simulate_ranks, place)
    else:
        sizes = bench.QUICK if options.quick else bench.WHOLE
        rows = list(harness.run(bench.cases(sizes, threads), place))
        rows += bench.derived(rows, sizes, place)
    # Before they are shown: whoever reads may have gone.
    if options.json:
        with Path(options.json).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row.to_dict()) + "\n" for row in rows)
    if options.plot:
        bench.plot(rows, options.plot)
    _show(bench, rows, rows[0].about)
    return 0 if all(row.checked for row in rows) else 1


def _show(bench: Any, rows: Sequence[Any], place: Mapping[str, Any]) -> None:
    from ..experiments.report import table

    print(f"{place['cpu']}, {place['simd']}; {', '.join(f'{name} {text}' for name, text in place['versions'].items())}")
    for part in bench.tables(rows):
        print(f"\n{table(part)}")
    for note in bench.notes(rows):
        print(f"\n{note}")
    stated = [row for row in rows if row.goal is not None]
    wrong = sum(not row.checked for row in rows)
    print(f"\n{sum(bool(row.met) for row in stated)} of {len(stated)} goals met", end="")
    print(
        f"; {wrong} row(s) whose result was not found right"
        if wrong
        else "; every result was checked before it was timed"
    )


def _threads(given: Sequence[int] | None, most: bool) -> list[int]:
    """How many threads to try, ``most``: all of them by default."""
    from .. import masks

    if given is None and most:
        return [masks.get_num_threads()]
    if given is None:
        return [1, 2] if masks.get_num_threads() > 1 else [1]
    for count in given:
        if not 1 <= count <= 1024:
            raise ConfigError(f"threads must lie in 1..=1024 (got {count}); 1 works on the calling thread alone")
    return sorted(set(given))


def check_writable(file: str | None, suffix: str = "") -> None:
    """Refuse before the work what could not be written after it."""
    if file is None:
        return
    path, folder = Path(file), Path(file).resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(
            f"the file cannot be written (got {file!r}); name a file in a folder that exists and is yours"
        )
    if not path.name.endswith(suffix):
        raise ConfigError(f"pictures are written in one format (got {file!r}); let the name end in {suffix}")
