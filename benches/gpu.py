"""``make gpu``: on a CUDA machine, every kernel against the reference, then the benchmarks; rows and a summary as files.

Needs the package, torch, triton, transformers, peft and numpy; no network and no data. Takes under ten minutes: what does
not fit any more is left out and named. ``--dry-run`` does the same at toy sizes in Triton's interpreter, on any machine.

Exit code 0 if every result was right, 1 if one was not, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, at import

import torch

SECONDS = {"kernels": 170.0, "hidden": 200.0, "attention": 360.0, "steps": 460.0}
"""After so long since the beginning no further part of a section begins. A part is never broken off: a model of 7 billion
weights, the largest, is to end before ten minutes are over."""


def main() -> int:
    """Run everything; returns the exit code."""
    parser = argparse.ArgumentParser("gpu.py", description="Check and time the CUDA kernels.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, in Triton's interpreter")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.stderr.write("make gpu: this machine has no CUDA device that torch can use; nothing was run\n")
        return 2
    from hiddenkey_rs.benchmarks import attention, devices, harness

    device = "cpu" if options.dry_run else "cuda"
    place = devices.place(harness.about(), device)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"gpu_{_slug('dry run' if options.dry_run else torch.cuda.get_device_name())}"
    lines = options.out / f"{name}.jsonl"
    begun, rows, left = time.monotonic(), [], []
    with lines.open("w", encoding="utf-8") as file:  # rows are on disk as they come, whatever happens later
        for title, seconds, some in _sections(device, place, options.dry_run):
            devices.say(f"gpu: {title}")
            for row in _until(some, begun + seconds, title, left):
                rows.append(row)
                file.write(json.dumps(row.to_dict()) + "\n")
                file.flush()
        grown = list(attention.growth([row for row in rows if row.bench == "attention"], place))
        file.writelines(json.dumps(row.to_dict()) + "\n" for row in grown)
        rows += grown
    text = summary(rows, place, left, time.monotonic() - begun)
    (options.out / f"{name}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0 if rows and all(row.checked for row in rows) else 1


def _sections(device: str, place: dict[str, Any], dry: bool) -> Iterator[tuple[str, float, Iterable[Iterable[Any]]]]:
    """Title, when to stop, and parts, whose rows are made as they are asked for."""
    from hiddenkey_rs.benchmarks import attention, harness, hidden, kernel_checks, step
    from hiddenkey_rs.benchmarks.attention_paths import KEPT, KERNEL, PLAIN, Layout

    threads = [torch.get_num_threads()]
    checks = (kernel_checks.check(device, place, [problem]) for problem in kernel_checks.problems(dry))
    yield "kernels against the reference", SECONDS["kernels"], checks
    shape, dtype = ((2, 5, 64), torch.float32) if dry else ((32, 1024, 4096), torch.bfloat16)
    yield (
        "HiddenCut and the residual add",
        SECONDS["hidden"],
        [harness.run(hidden.cases(shape, dtype, device, threads[0], goals=not dry), place)],
    )
    sizes = attention.CUDA
    if dry:
        columns, elements = Layout(2, 1, 16), Layout(2, 2, 16, pattern="element", position="dropattention")
        paths = ((columns, KEPT, (PLAIN, KERNEL)), (elements, KERNEL, (PLAIN,)))
        series = tuple(attention.Series(layout, (32,), (0.1,), ours, peers) for layout, ours, peers in paths)
        sizes = replace(sizes, tokens=64, series=series, device=device, dtype=torch.float32, goals=False)
    lengths = [replace(series, lengths=(length,)) for series in sizes.series for length in series.lengths]
    parts = (attention.run(replace(sizes, series=(series,)), threads, place) for series in lengths)
    yield "attention", SECONDS["attention"], parts
    models = _steps(device, dry)
    steps = (step.run(replace(models, shapes=(shape,)), threads, place) for shape in models.shapes)
    yield "training steps", SECONDS["steps"], steps


def _steps(device: str, dry: bool) -> Any:
    """The encoder and the decoder of ``bench step``, and where memory allows a decoder of 7 billion weights."""
    from hiddenkey_rs.benchmarks import step

    if dry:
        shape = replace(step.QUICK.shapes[0], layers=1, hidden=16, heads=1, vocab=50, length=6, batch=2, ffn=32)
        return replace(step.QUICK, shapes=(shape,), samples=1, memory=False, budget=0.0)
    shapes = [replace(shape, dtype="bfloat16") for shape in step.WHOLE.shapes]
    if torch.cuda.get_device_properties(0).total_memory > 70e9:
        large = replace(shapes[1], layers=32, hidden=4096, heads=32, vocab=32000, length=1024, batch=2, ffn=11008)
        shapes.append(large)
    return replace(step.WHOLE, shapes=tuple(shapes), device=device, profile=True)


def _until(parts: Iterable[Iterable[Any]], end: float, title: str, left: list[str]) -> Iterator[Any]:
    """Every row of the parts that begin before the clock says stop; at least of one."""
    iterator = iter(parts)
    for part in iterator:
        yield from part
        if time.monotonic() > end:
            if next(iterator, None) is not None:
                left.append(f"the rest of {title}")
            return


def summary(rows: Sequence[Any], place: dict[str, Any], left: Sequence[str], seconds: float) -> str:
    """The run in Markdown."""
    from hiddenkey_rs.benchmarks import attention, step

    versions = ", ".join(f"{name} {text}" for name, text in place["versions"].items())
    stated, wrong = [row for row in rows if row.goal is not None], [row for row in rows if not row.checked]
    checks = [row for row in rows if row.bench == "kernels"]
    parts = [
        f"# Figures on {place['versions'].get('gpu', 'a CPU (dry run)')}",
        f"`make gpu`, commit {place['commit']}, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s. {versions}; {place['cpu']}.",
        f"{sum(row.checked for row in checks)} of {len(checks)} kernel checks right; {len(wrong)} row(s) whose result was "
        f"not found right; {sum(bool(row.met) for row in stated) - sum(bool(row.met) for row in checks)} of "
        f"{len(stated) - len(checks)} goals met.",
    ]
    if left:
        parts.append(f"Left out for lack of time: {', '.join(left)}.")
    parts += ["## Kernels", _kernels(checks)]
    parts += ["## HiddenCut and the residual add", *_markdown([[r.cells() for r in rows if r.bench == "hidden"]])]
    for bench in (attention, step):
        name = bench.__name__.rpartition(".")[2]
        mine = [row for row in rows if row.bench == name]
        if mine:
            parts += [f"## {name.capitalize()}", *_markdown(bench.tables(mine)), *bench.notes(mine)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _kernels(checks: Sequence[Any]) -> str:
    """The largest error of every kind and dtype."""
    worst: dict[tuple[str, str], float] = {}
    for row in checks:
        key = (row.case, row.sizes["dtype"])
        worst[key] = max(worst.get(key, 0.0), row.ours["median"])
    names, dtypes = list(dict.fromkeys(name for name, _ in worst)), list(dict.fromkeys(dtype for _, dtype in worst))
    cells = [
        {"largest error": name, **{d: f"{worst[name, d]:.1e}" if (name, d) in worst else "-" for d in dtypes}}
        for name in names
    ]
    return "\n".join(_markdown([cells]))


def _markdown(tables: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    found = []
    for rows in tables:
        if rows:
            lines = [list(rows[0]), ["---"] * len(rows[0]), *[[str(cell) for cell in row.values()] for row in rows]]
            found.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main())
