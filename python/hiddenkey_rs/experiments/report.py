"""Tables for the terminal and pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .extras import extra

# Okabe and Ito's colours: told apart by colour-blind readers, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned plain text, one line a row, columns in the first row's order; numbers to four digits."""
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, path: str | Path, title: str) -> None:
    """One PNG: loss (training dashed, development solid) and the development metric against the epoch.

    ``runs``: name -> history, a list of ``{"epoch": 1, "train": {"loss", metric}, "dev": {...}}``. A ring marks the epoch of
    each run's best development metric.
    """
    matplotlib = extra("matplotlib")
    matplotlib.use("Agg")
    plt = extra("matplotlib.pyplot")
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for (name, history), colour in zip(runs.items(), _COLOURS * len(runs), strict=False):
        epochs = [entry["epoch"] for entry in history]
        losses.plot(epochs, [e["train"]["loss"] for e in history], "--", color=colour, alpha=0.75, marker=".")
        losses.plot(epochs, [e["dev"]["loss"] for e in history], "-", color=colour, marker="o", ms=4, label=name)
        scores.plot(epochs, [e["train"][metric] for e in history], "--", color=colour, alpha=0.75, marker=".")
        values = [e["dev"][metric] for e in history]
        scores.plot(epochs, values, "-", color=colour, marker="o", ms=4, label=name)
        best = next(n for n, entry in enumerate(history) if entry.get("best")) if history else 0
        scores.plot(epochs[best], values[best], "o", ms=11, mfc="none", mec=colour, mew=1.6)
    _dress(losses, "loss, nats" if metric != "pearson" else "loss")
    _dress(scores, metric.replace("_", " "))
    if metric == "perplexity":
        scores.set_yscale("log")
    scores.legend(frameon=False, loc="best", title="solid: development, dashed: training", title_fontsize=8, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _dress(axes: Any, label: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(True, alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
