"""``make gpu``: on a CUDA machine, every kernel against the reference, then the benchmarks; rows and a summary as files.

Needs the package, torch, triton, transformers, peft and numpy; no network and no data. Takes under ten minutes, or as many
seconds as ``--seconds`` says: what does not fit any more is left out and named. ``--dry-run`` does the same at toy sizes in
Triton's interpreter, on any machine.

Work is done in processes of their own, kernel checks in several at once, which compile side by side: a fault on the device
ends one process, costs the part that it was at, and the rest goes on in a new one. Models are built, compiled and checked
side by side, too, and timed one after the other, once all are ready. Rows and summary are on disk as they come.

Exit code 0 if every result was right; 1 if one was not, or a part could not be run; 2 without a CUDA device; 3 if nothing
was wrong, and time ran out before everything was looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, at import

import torch

SECTIONS = {"kernels": 0.30, "hidden": 0.33, "attention": 0.62, "steps": 0.80}
"""Sections, and after what part of the time no further part of one begins."""
REHEARSAL = "rehearsal"
"""All of them in one process, which takes long to begin."""
BUILT = 0.5
"""After what part of the time that is left as it begins a section of models goes on with those that are built."""
SECONDS = 590.0
"""After so many whatever still runs is ended."""
CHECKERS = 15
"""Most processes that check kernels."""
_RETURN = 3
"""A process' exit code after a fault that its device does not recover from."""


def main() -> int:
    """Run everything; returns the exit code."""
    parser = argparse.ArgumentParser("gpu.py", description="Check and time the CUDA kernels.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time it may take (default {SECONDS:.0f})")
    parser.add_argument(
        "--sections", nargs="+", choices=tuple(SECTIONS), metavar="NAME", help=f"some of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--part", nargs=4, metavar=("SECTION", "FROM", "EVERY", "UNTIL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.stderr.write("make gpu: this machine has no CUDA device that torch can use; nothing was run\n")
        return 2
    if options.part:
        section, start, every, until = options.part
        return work(section, int(start), int(every), float(until), options.dry_run)
    sections = options.sections or ([REHEARSAL] if options.dry_run else ())
    return Run(options.out, options.dry_run, options.seconds, sections).everything()


# -- one process ---------------------------------------------------------------------------------------------------


def work(section: str, start: int, every: int, until: float, dry: bool) -> int:
    """Parts ``start``, ``start + every``, ... of a section; what happens goes to standard output, a JSON object a line."""
    device = "cpu" if dry else "cuda"
    number = start - every
    try:
        from hiddenkey_rs.benchmarks import devices, harness

        place = devices.place(harness.about(), device)
        made = parts(section, device, place, dry)
        _tell(parts=len(made))
        for number in range(start, len(made), every):
            if time.time() > until and number != start:
                _tell(left=len(range(number, len(made), every)))
                return 0
            _tell(part=number)
            for row in made[number]():
                _tell(row=row.to_dict(), first=row.first)
            _alive(device)
    except Exception as error:  # whatever it is: the other parts still count
        _tell(failed=f"{section}, part {max(number, start)}: {type(error).__name__}: {str(error)[:300]}")
        return _RETURN
    return 0


def _tell(**said: Any) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def _alive(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()  # raises after a fault, from which no later call recovers


def parts(section: str, device: str, place: dict[str, Any], dry: bool) -> list[Any]:
    """What a section consists of: functions that make rows."""
    makers = {"kernels": _kernels, "hidden": _hidden, "attention": _attention, "steps": _steps}
    names = list(makers) if section == REHEARSAL else [section]
    return [part for name in names for part in makers[name](device, place, dry)]


def _kernels(device: str, place: dict[str, Any], dry: bool) -> list[Any]:
    from hiddenkey_rs.benchmarks import kernel_checks

    return [lambda one=one: kernel_checks.check(device, place, [one]) for one in kernel_checks.problems(dry)]


def _hidden(device: str, place: dict[str, Any], dry: bool) -> list[Any]:
    from hiddenkey_rs.benchmarks import harness, hidden

    shape, dtype = ((2, 5, 64), torch.float32) if dry else ((32, 1024, 4096), torch.bfloat16)
    threads = torch.get_num_threads()
    return [lambda: harness.run(hidden.cases(shape, dtype, device, threads, goals=not dry), place)]


def _attention(device: str, place: dict[str, Any], dry: bool) -> list[Any]:
    from hiddenkey_rs.benchmarks import attention
    from hiddenkey_rs.benchmarks.attention_paths import KEPT, KERNEL, PLAIN, Layout

    sizes = replace(attention.CUDA, budget=0.15)
    if dry:
        columns, elements = Layout(2, 1, 16), Layout(2, 2, 16, pattern="element", position="dropattention")
        paths = ((columns, KEPT, (PLAIN, KERNEL)), (elements, KERNEL, (PLAIN,)))
        series = tuple(attention.Series(layout, (16,), (0.1,), ours, peers) for layout, ours, peers in paths)
        sizes = replace(sizes, tokens=16, budget=0.0, series=series, device=device, dtype=torch.float32, goals=False)
    # Of every layout the length first that goals begin at: should time run out, each has been looked at.
    single = [replace(series, lengths=(length,)) for series in sizes.series for length in series.lengths]
    single.sort(key=lambda series: (series.lengths[0] != 2048, series.lengths[0] < 2048))
    threads = [torch.get_num_threads()]
    return [lambda one=one: attention.run(replace(sizes, series=(one,)), threads, place) for one in single]


def _steps(device: str, place: dict[str, Any], dry: bool) -> list[Any]:
    """The models of ``bench step``, and where memory allows a decoder of 7 billion weights and an encoder of the paper's size.

    On those two the device is what a step waits for; on the small ones it is the host, unless CUDA graphs free it.
    """
    from hiddenkey_rs.benchmarks import step

    if dry:
        shape = replace(step.QUICK.shapes[0], layers=1, hidden=16, heads=1, vocab=50, length=6, batch=2, ffn=32)
        sizes = [replace(step.QUICK, shapes=(shape,), samples=1, memory=False, budget=0.0)]
    else:
        encoder, decoder = (replace(shape, dtype="bfloat16") for shape in step.WHOLE.shapes)
        whole = replace(step.WHOLE, device=device, budget=1.0)
        sizes = [replace(whole, shapes=(shape,), graphs=True) for shape in (encoder, decoder)]
        if torch.cuda.get_device_properties(0).total_memory > 70e9:
            llama = {
                "layers": 32,
                "hidden": 4096,
                "heads": 32,
                "vocab": 32000,
                "length": 1024,
                "batch": 2,
                "ffn": 11008,
            }
            large = {"layers": 24, "hidden": 1024, "heads": 16, "vocab": 50265, "length": 512, "batch": 48, "ffn": 4096}
            shapes = (replace(decoder, **llama), replace(encoder, **large))
            sizes = [replace(whole, shapes=(shape,)) for shape in shapes] + sizes
    threads = [torch.get_num_threads()]
    return [lambda one=one: step.run(one, threads, place, _wait_for_turn) for one in sizes]


def _wait_for_turn() -> None:
    """Everything but the timing is done: the others' may be under way."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    _tell(ready=True)
    sys.stdin.readline()


# -- all of them ---------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A process at work on every ``every``-th part of a section, and where it was when it last said so."""

    start: int
    every: int
    process: Any = None
    at: int | None = None
    parts: int = 0
    ready: bool = False
    """Whether everything is built that it times. timing: whether it had its turn."""
    timing: bool = False
    said: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    """Its lines, and ``None`` behind the last one."""


@dataclass
class Run:
    """All sections, and what came of them."""

    out: Path
    dry: bool
    seconds: float
    sections: Sequence[str] = ()
    rows: list[Any] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def everything(self) -> int:
        """Returns the exit code."""
        from hiddenkey_rs.benchmarks import attention, devices, harness

        self.place = devices.place(harness.about(), "cpu" if self.dry else "cuda")
        self.begun, self.clock = time.monotonic(), time.time()
        self.out.mkdir(parents=True, exist_ok=True)
        card = _slug("dry run" if self.dry else torch.cuda.get_device_name())
        name = "_".join(["gpu", card, *(section for section in self.sections if section != REHEARSAL)])
        self.text = self.out / f"{name}.md"
        with (self.out / f"{name}.jsonl").open("w", encoding="utf-8") as self.file:
            for section in self.sections or SECTIONS:
                devices.say(f"gpu: {section}")
                self._section(section)
                self._write()
            for row in attention.growth([row for row in self.rows if row.bench == "attention"], self.place):
                self._keep(row)
        sys.stdout.write(self._write())
        if self.failed or not self.rows or not all(row.checked for row in self.rows):
            return 1
        return 3 if self.left.total() else 0

    def _until(self, section: str) -> float:
        return self.clock + SECTIONS.get(section, 1.0) * self.seconds

    def _section(self, section: str) -> None:
        many = max(1, min(CHECKERS, len(os.sched_getaffinity(0)) - 1))
        many = 1 if self.dry else {"kernels": many, "steps": 4}.get(section, 1)
        self.built = time.monotonic() + BUILT * (self.seconds - (time.monotonic() - self.begun))
        workers = [Worker(start, many) for start in range(many)]
        try:
            for worker in workers:
                self._begin(section, worker)
            while workers:
                for worker in list(workers):
                    if not self._goes_on(section, worker):
                        workers.remove(worker)
                self._give_turn(workers)
        finally:
            for worker in workers:  # none, unless something broke here
                worker.process.kill()

    def _begin(self, section: str, worker: Worker) -> None:
        until = str(self._until(section))
        command = [sys.executable, __file__, "--part", section, str(worker.start), str(worker.every), until]
        worker.process = subprocess.Popen(
            command + ["--dry-run"] * self.dry,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        worker.at, worker.ready, worker.timing = None, False, False
        threading.Thread(target=_listen, args=(worker.process.stdout, worker.said), daemon=True).start()

    def _give_turn(self, workers: Sequence[Worker]) -> None:
        """Let one go on of those that wait to time something, if no other is at it, and none builds that has time to."""
        timing = [worker for worker in workers if worker.timing]
        building = [worker for worker in workers if not worker.ready]
        if timing or (building and time.monotonic() < self.built):
            return
        for worker in workers:
            if worker.ready:
                worker.timing = True
                with suppress(BrokenPipeError):  # it has ended; what it left unsaid is found out elsewhere
                    worker.process.stdin.write("\n")
                    worker.process.stdin.flush()
                return

    def _goes_on(self, section: str, worker: Worker) -> bool:
        """Take what a worker has said so far; False once it has ended for good."""
        try:
            line = worker.said.get(timeout=0.05)
        except queue.Empty:
            return self._in_time(section, worker)
        if line is not None:
            said = json.loads(line)
            if "part" in said:
                worker.at, worker.ready, worker.timing = said["part"], False, False
            worker.parts, worker.ready = said.get("parts", worker.parts), said.get("ready", worker.ready)
            if "row" in said:
                self._keep(self._row(said))
            if "left" in said:
                self.left[section] += said["left"]
            if "failed" in said:
                self.failed.append(said["failed"])
            return True
        code = worker.process.wait()
        if code == 0:
            return False
        if code != _RETURN:
            self.failed.append(f"{section}, part {worker.at}: the process ended with exit code {code}")
        if worker.at is None:  # it did not even begin, and another one would not
            return False
        worker.start = worker.at + worker.every
        rest = len(range(worker.start, worker.parts, worker.every))
        if time.time() > self._until(section):
            self.left[section] += rest
        elif rest:
            self._begin(section, worker)
            return True
        return False

    def _in_time(self, section: str, worker: Worker) -> bool:
        """Whether a worker that says nothing may go on; it is ended otherwise."""
        if time.monotonic() - self.begun <= self.seconds:
            return True
        worker.process.kill()
        worker.process.wait()
        self.left[section] += (
            len(range(worker.start if worker.at is None else worker.at, worker.parts, worker.every)) or 1
        )
        return False

    def _row(self, said: dict[str, Any]) -> Any:
        from hiddenkey_rs.benchmarks.harness import Row

        return Row.from_dict(said["row"], said["first"])

    def _keep(self, row: Any) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(row.to_dict()) + "\n")
        self.file.flush()

    def _write(self) -> str:
        left = [f"{count} part(s) of {section}" for section, count in self.left.items() if count]
        text = summary(self.rows, self.place, left, self.failed, time.monotonic() - self.begun)
        self.text.write_text(text, encoding="utf-8")
        return text


def _listen(stream: Any, said: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        if "{" in line:  # libraries may write there, too, and leave their line open
            said.put(line[line.index("{") :])
    said.put(None)


def summary(
    rows: Sequence[Any], place: dict[str, Any], left: Sequence[str], failed: Sequence[str], seconds: float
) -> str:
    """The run in Markdown."""
    from hiddenkey_rs.benchmarks import attention, step

    versions = ", ".join(f"{name} {text}" for name, text in place["versions"].items())
    stated, wrong = [row for row in rows if row.goal is not None], [row for row in rows if not row.checked]
    checks = [row for row in rows if row.bench == "kernels"]
    right = f"{sum(row.checked for row in checks)} of {len(checks)} kernel checks right; " if checks else ""
    parts = [
        f"# Figures on {place['versions'].get('gpu', 'a CPU (dry run)')}",
        f"`make gpu`, commit {place['commit']}, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s. {versions}; {place['cpu']}.",
        f"{right}{len(wrong)} row(s) whose result was "
        f"not found right; {sum(bool(row.met) for row in stated) - sum(bool(row.met) for row in checks)} of "
        f"{len(stated) - len(checks)} goals met.",
    ]
    if left:
        parts.append(f"Left out for lack of time: {', '.join(left)}.")
    if failed:
        parts.append("Could not be run:\n\n" + "\n".join(f"* {what}" for what in failed))
    parts += ["## Kernels", _errors(checks)] if checks else []
    hidden = [row.cells() for row in rows if row.bench == "hidden"]
    parts += ["## HiddenCut and the residual add", *_markdown([hidden])] if hidden else []
    for bench in (attention, step):
        name = bench.__name__.rpartition(".")[2]
        mine = [row for row in rows if row.bench == name]
        if mine:
            parts += [f"## {name.capitalize()}", *_markdown(bench.tables(mine)), *bench.notes(mine)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _errors(checks: Sequence[Any]) -> str:
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


def _markdown(tables: Iterable[Sequence[dict[str, str]]]) -> list[str]:
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
