"""Rows of ``bench attention`` as tables by length, as sentences, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..experiments.extras import extra
from .attention_paths import BLOCKED, BOOLEAN, FLASH, GATHERED, KERNEL, PLAIN
from .harness import Goal, Row, figure

# Okabe and Ito's colours: told apart by colour-blind readers, and in print.
_COLOURS = ("#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#009E73", "#999999", "#000000")

_OURS = (GATHERED, BLOCKED, KERNEL)

Lines = dict[str, dict[int, float]]
"""Path and rate -> (length -> a figure)."""


def ratio(ours: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Summary of one entrant divided by the median of another.

    Example:
        >>> ratio({"median": 3.0, "p10": 2.0, "p90": 4.0, "n": 7}, {"median": 2.0})
        {'median': 1.5, 'p10': 1.0, 'p90': 2.0, 'n': 7}
    """
    parts = {name: ours[name] / other["median"] for name in ("median", "p10", "p90")}
    return {**parts, "n": ours["n"]}


def tables(rows: Sequence[Row]) -> list[list[dict[str, str]]]:
    """Rows with goals or against the first peer; then for each layout milliseconds and times of SDPA by length."""
    found = [[cells(row) for row in rows if row.first or row.goal is not None or not row.checked]]
    for name in layouts(rows):
        mine = [row for row in rows if layout(row) == name]
        milliseconds, relative = by_length(mine)
        if len({row.sizes["length"] for row in mine}) > 1:
            found.append(_table(f"ms, {name}", milliseconds))
            found.append(_table(f"of {mine[0].peer['name']}, {name}", relative))
    return found


def cells(row: Row) -> dict[str, str]:
    """A row in the columns of the first table."""
    sizes = row.sizes
    met = {None: "", True: "yes", False: "NO"}[row.met] if row.checked else "UNCHECKED"
    return {
        "case": row.case,
        "L": str(sizes["length"]),
        "B": str(sizes["batch"]),
        "heads": _heads(sizes),
        "threads": str(row.threads),
        "rate": str(sizes["rate"]),
        "unit": row.unit,
        "ours": figure(row.ours["median"]),
        "p10-p90": f"{figure(row.ours['p10'])}-{figure(row.ours['p90'])}",
        "peer": str(row.peer["name"]),
        "peer's": figure(row.peer["median"]),
        "of peer": "-" if row.speedup is None else f"{1 / row.speedup:.2f}",
        "goal": bound(row.goal),
        "met": met,
    }


def bound(goal: Goal | None) -> str:
    """A speedup goal as the share of the peer's time that it allows.

    Example:
        >>> bound(Goal("speedup", 1 / 0.93)), bound(None)
        ('<= 0.93', '')
    """
    if goal is None:
        return ""
    return f"<= {1 / goal.bound:.2f}" if goal.measure == "speedup" else str(goal)


def layout(row: Row) -> str:
    """Which rows belong into one table: what was dropped, over which heads, on how many threads."""
    where = "" if row.about.get("device") == "cuda" else f", {row.threads} thread(s)"
    return f"{row.case.removesuffix(', not gathered')}, {_heads(row.sizes)}, {row.sizes['dtype']}{where}"


def layouts(rows: Sequence[Row]) -> list[str]:
    """The layouts of the rows that were timed, in order."""
    return list(dict.fromkeys(layout(row) for row in rows if row.unit == "ms"))


def by_length(rows: Sequence[Row]) -> tuple[Lines, Lines]:
    """Milliseconds, and times of the first peer in the same case, of every path and rate."""
    absolute: Lines = {}
    relative: Lines = {}
    for row in rows:
        if not row.checked or row.unit != "ms":
            continue
        base = next(r for r in rows if r.first and (r.sizes, r.threads) == (row.sizes, row.threads)).peer["median"]
        for name, median in ((_ours(row), row.ours["median"]), (row.peer["name"], row.peer["median"])):
            # Undropped attention does not depend on the rate; the first rate's stands for it.
            label = name if name in (PLAIN, FLASH) else f"{name} {row.sizes['rate']}"
            absolute.setdefault(label, {}).setdefault(row.sizes["length"], median)
            if base:
                relative.setdefault(label, {}).setdefault(row.sizes["length"], median / base)
    order = sorted(absolute, key=lambda label: (_rank(label), label))
    return {name: absolute[name] for name in order}, {name: relative[name] for name in order if name in relative}


def crossovers(rows: Sequence[Row]) -> list[str]:
    """For each layout and rate, the length from which gathering costs less than a row of flags."""
    found = []
    for name in layouts(rows):
        lines = by_length([row for row in rows if layout(row) == name])[0]
        for label in [label for label in lines if label.startswith(_OURS)]:
            rate = label.split()[-1]
            boolean = lines.get(f"{BOOLEAN} {rate}")
            if boolean is None:
                continue
            lengths = sorted(set(lines[label]) & set(boolean))
            start = None
            for length in reversed(lengths):
                if lines[label][length] > boolean[length]:
                    break
                start = length
            where = f"pays from L {start} on" if start else f"does not pay up to L {max(lengths, default=0)}"
            found.append(f"{name}, rate {rate}: {label.rsplit(' ', 1)[0]} {where}, against a {BOOLEAN} mask")
    return found


def plot(rows: Sequence[Row], path: str) -> None:
    """One PNG of the first layout: milliseconds against length, and times of undropped SDPA."""
    extra("matplotlib").use("Agg")
    plt = extra("matplotlib.pyplot")
    name = layouts(rows)[0]
    mine = [row for row in rows if layout(row) == name]
    absolute, relative = by_length(mine)
    picture, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    colours = dict(zip(absolute, _COLOURS * len(absolute), strict=False))
    for axis, lines, up in ((axes[0], absolute, "ms"), (axes[1], relative, f"times of {mine[0].peer['name']}")):
        for label, line in lines.items():
            own = label.startswith(_OURS)
            lengths = sorted(line)
            axis.plot(
                lengths, [line[n] for n in lengths], marker="o", ms=4, lw=2.2 if own else 1.2, color=colours[label],
                ls="--" if label.startswith(BOOLEAN) else "-", label=label,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"L (B L about {mine[0].sizes['length'] * mine[0].sizes['batch']} tokens)")
        axis.set_ylabel(f"{up}, forward + backward")
        axis.grid(True, alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, min(4.0, max((max(line.values()) for line in relative.values()), default=1.0) * 1.05))
    axes[0].legend(frameon=False, fontsize=7)
    place = mine[0].about
    device = place["versions"].get("gpu", place["cpu"])
    picture.suptitle(f"{name}; {device}", x=0.01, ha="left", fontsize=11)
    picture.savefig(path, dpi=130)
    plt.close(picture)


def _table(head: str, lines: Lines) -> list[dict[str, str]]:
    lengths = sorted({length for line in lines.values() for length in line})
    return [
        {head: name, **{f"L {length}": figure(line.get(length)) for length in lengths}} for name, line in lines.items()
    ]


def _ours(row: Row) -> str:
    return BOOLEAN if row.case.endswith(", not gathered") else str(row.sizes["impl"])


def _rank(label: str) -> int:
    return 0 if label.startswith(_OURS) else 1 if label.startswith(BOOLEAN) else 2


def _heads(sizes: Mapping[str, Any]) -> str:
    groups = "" if sizes["heads"] == sizes["kv_heads"] else f"/{sizes['kv_heads']}"
    return f"{sizes['heads']}{groups}x{sizes['head_size']}"
