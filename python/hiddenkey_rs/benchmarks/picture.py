"""Pictures of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..experiments.extras import extra

# Okabe and Ito's colours: told apart by colour-blind readers, and in print. Ours are the first two.
_COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#999999", "#000000")


def generators(series: Mapping[str, Mapping[int, float]], path: str, title: str) -> None:
    """One PNG: nanoseconds a decision against size, and the generators against each other at the largest size.

    ``series``: generator -> (decisions -> nanoseconds a decision); what is ours begins with "ours".
    """
    extra("matplotlib").use("Agg")
    plt = extra("matplotlib.pyplot")
    figure, (sizes, bars) = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    colours = dict(zip(series, _COLOURS * len(series), strict=False))
    for name, line in series.items():
        width = 2.2 if name.startswith("ours") else 1.2
        sizes.plot(list(line), list(line.values()), marker="o", ms=4, lw=width, color=colours[name], label=name)
    sizes.set_xscale("log", base=2)
    sizes.set_yscale("log")
    _dress(sizes, "decisions in a call", "ns a decision")
    sizes.legend(frameon=False, fontsize=8)
    largest = max(size for line in series.values() for size in line)
    times = {name: line[largest] for name, line in series.items() if largest in line}
    ours = min((time for name, time in times.items() if name.startswith("ours")), default=min(times.values()))
    names = sorted(times, key=lambda name: times[name], reverse=True)
    bars.grid(False)
    bars.barh(names, [times[name] for name in names], color=[colours[name] for name in names])
    for place, name in enumerate(names):
        bars.text(times[name], place, f"  {times[name]:.3g} ns, {times[name] / ours:.3g}x", va="center", fontsize=8)
    bars.set_xscale("log")
    bars.set_xlim(right=6 * max(times.values()))
    _dress(bars, f"ns a decision, $2^{{{largest.bit_length() - 1}}}$ decisions; times of ours", "")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def speedups(times: Mapping[str, float], path: str, title: str) -> None:
    """One PNG: how many times as fast ours is, a bar for each comparison, on a logarithmic axis."""
    extra("matplotlib").use("Agg")
    plt = extra("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(9.5, 1.2 + 0.34 * len(times)), layout="constrained")
    names = list(times)[::-1]
    axes.barh(names, [times[name] for name in names], color=_COLOURS[0], height=0.62)
    for place, name in enumerate(names):
        axes.text(times[name], place, f"  {times[name]:.3g}x", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlim(right=4 * max(times.values()))
    axes.grid(False)
    _dress(axes, "", "")
    axes.grid(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _dress(axes: Any, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(True, alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
