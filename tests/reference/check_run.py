"""Draws the masks of a run again: `python tests/reference/check_run.py RUN` compares every digest in its masks.jsonl.

Runs write that file when they are trained with `--log-masks N`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reference import masks


def digest(line: dict) -> str:
    """SHA-256 of the reference's mask for one line of masks.jsonl, one byte a decision."""
    where = [line[name] for name in ("seed", "step", "branch", "layer", "site", "samples")]
    _, heads, rows, columns = line["shape"]
    if line["pattern"] == "element":
        keep = reference_element(where, rows, columns, line["rate"], heads)
    elif line["pattern"] == "column":
        keep = masks.column(*where, columns, line["rate"], heads=heads)
        for example, length in enumerate(line["lengths"]):
            keep[example, ..., length:] = False  # there is nothing to keep behind an example's end
    else:
        keep = masks.span(*where, line["lengths"], line["rate"], heads=heads)
    return hashlib.sha256(np.ascontiguousarray(keep).tobytes()).hexdigest()


def reference_element(where: list, rows: int, columns: int, rate: float, heads: int) -> np.ndarray:
    """The element mask, one sample at a time: the reference spends a Philox block on every decision."""
    *site, samples = where
    return np.concatenate([masks.element(*site, [sample], rows, columns, rate, heads=heads) for sample in samples])


def main(run: str) -> int:
    lines = [json.loads(line) for line in (Path(run) / "masks.jsonl").read_text().splitlines()]
    wrong = [line for line in lines if digest(line) != line["sha256"]]
    steps = sorted({line["step"] for line in lines})
    decisions = sum(int(np.prod(line["shape"])) for line in lines)
    print(f"{len(lines)} masks, {decisions} decisions, steps {steps}: {len(wrong)} differ from the reference")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
