"""The figures behind tables and pictures as CSV: full precision, one row a run, an epoch, a cell or a comparison."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from ..statistics import mean_interval
from .comparisons import Comparison
from .early_stopping import stops
from .measures import at, measures, values
from .runs import curve_points
from .studies import Study

Row = Mapping[str, Any]


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Rows under the union of their columns, in the order of appearance; nothing of a figure that a row lacks."""
    held = list(rows)
    columns = list(dict.fromkeys(name for row in held for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(held)


def runs(studies: Sequence[Study]) -> Iterator[Row]:
    """Every run with its figures at the chosen and the last epoch, and its command."""
    for study in studies:
        for item in study.found.values():
            line = item.line
            row: dict[str, Any] = {"study": study.name, "id": line.id, "stage": line.stage, "task": line.task}
            row |= {"method": line.method, "setting": json.dumps(dict(line.setting)), "rank": line.rank}
            row |= {"seed": line.seed, "status": line.status, "error": line.error, "diverged_at_step": line.step}
            for when in ("chosen", "last") if item.done else ():
                entry = at(line, when)
                row[f"epoch_{when}"] = entry["epoch"]
                for part in ("train", "select", "report"):
                    row |= {f"{part}_{name}_{when}": value for name, value in entry.get(part, {}).items()}
            row |= {"seconds": line.seconds, "seconds_per_step": line.seconds_per_step, "peak_rss_mb": line.peak_rss_mb}
            row |= {"machine": line.machine, "commit": line.commit, "command": line.command, "line": item.place}
            yield row


def epochs(studies: Sequence[Study]) -> Iterator[Row]:
    """Every epoch of every run."""
    for study in studies:
        for item in study.found.values():
            for entry in item.line.history:
                row = {"study": study.name, "id": item.line.id, "epoch": entry.get("epoch"), "step": entry.get("step")}
                for part in ("train", "select", "report"):
                    row |= {f"{part}_{name}": value for name, value in entry.get(part, {}).items()}
                yield row


def cells(studies: Sequence[Study]) -> Iterator[Row]:
    """Every task, method and measure over the final seeds."""
    for study in studies:
        for task in study.plan.tasks:
            for method in study.plan.methods:
                for measure in measures(study.plan.task_of(task)):
                    found = list(values(measure, study.finals(task, method)).values())
                    row = {"study": study.name, "task": task, "method": method, "measure": measure.key, "n": len(found)}
                    if found:
                        band = mean_interval(found)
                        spread = stdev(found) if len(found) > 1 else None
                        row |= {"mean": band.estimate, "sd": spread, "low": band.low, "high": band.high}
                    yield row


def comparisons(families: Iterable[tuple[Study, str, Sequence[Comparison]]]) -> Iterator[Row]:
    """Every comparison of every family."""
    for study, name, family in families:
        for entry in family:
            row: dict[str, Any] = {"study": study.name, "family": name, "task": entry.task, "method": entry.method}
            row |= {"baseline": entry.baseline, "measure": entry.measure.key, "verdict": entry.verdict}
            row |= {"pairs": len(entry.seeds), "planned": entry.planned, "p": entry.p, "p_holm": entry.corrected}
            row |= {"diverged": entry.diverged[0], "baseline_diverged": entry.diverged[1]}
            for label, band in (("mean", entry.difference), ("g", entry.effect), ("bootstrap", entry.resampled)):
                if band is not None:
                    row |= {label: band.estimate, f"{label}_low": band.low, f"{label}_high": band.high}
            row["bootstrap_p"] = None if entry.resampled is None else entry.resampled.p
            row["bootstrap_over"] = "seeds and rows" if entry.with_rows else "seeds"
            row |= {"seeds_needed": entry.needed[0], "seeds_needed_family_alpha": entry.needed[1]}
            plain, strict = entry.detectable or (None, None)
            yield row | {"detectable": plain, "detectable_family_alpha": strict}


def early_stopping(studies: Sequence[Study]) -> Iterator[Row]:
    """Every difference between epochs, of the metric and of the loss."""
    for study in studies:
        for entry in (entry for found in stops(study) for entry in found.values()):
            row: dict[str, Any] = {"study": study.name, "task": entry.task, "method": entry.method}
            other = "last" if entry.measure.when == "chosen" else "chosen"
            row |= {"epoch": entry.measure.when, "baseline": entry.baseline, "baseline_epoch": other}
            row |= {"figure": entry.measure.name, "pairs": len(entry.seeds), "planned": entry.planned}
            if (band := entry.difference) is not None:
                row |= {"mean": band.estimate, "low": band.low, "high": band.high}
            yield row


def curves(studies: Sequence[Study]) -> Iterator[Row]:
    """Every point of every curve."""
    for study in studies:
        for key, curve in study.plan.curves.items():
            for point in curve_points(study, key):
                row = {"study": study.name, "curve": key, "vary": curve.vary, "task": point["task"]}
                row |= {"method": point["method"], "value": point["value"], "n": point["runs"]}
                for name in ("metric", "loss"):
                    if (band := point[name]) is not None:
                        row |= {name: band.estimate, f"{name}_low": band.low, f"{name}_high": band.high}
                yield row
