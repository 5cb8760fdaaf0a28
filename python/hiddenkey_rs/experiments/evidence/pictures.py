"""Pictures of a study, one panel a file: a page lays panels side by side where it is wide, below each other on a phone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import extra
from ..statistics import Interval, mean_interval
from . import paper
from .comparisons import Comparison
from .measures import Measure
from .paper_tables import methods_of
from .render import Picture
from .runs import curve_points
from .studies import Study

# Okabe and Ito's colours: told apart by colour-blind readers, and in print. Beyond seven the marker and the line tell.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS, _LINES = ("o", "s", "^", "D"), ("-", "--", "-.", ":")
_GREY, _SIZE = "#767676", (5.4, 3.6)


class Pictures:
    """Draws a study's pictures into a folder.

    Args:
        study: what to draw. folder: where. below: the folder's name, for the paths in the page. curves: the paper's, see
            :func:`.paper.figure_4`.
    """

    def __init__(self, study: Study, folder: Path, below: str, curves: paper.Curves) -> None:
        self.study, self.folder, self.below, self.theirs = study, folder, below, curves
        extra("matplotlib").use("Agg")
        self.plt = extra("matplotlib.pyplot")
        looks = {}
        for number, method in enumerate(study.plan.methods):
            turn = number // len(_COLOURS)
            looks[method] = {
                "color": _COLOURS[number % len(_COLOURS)],
                "marker": _MARKERS[turn % len(_MARKERS)],
                "ls": _LINES[turn % len(_LINES)],
            }
        self.looks: Mapping[str, Mapping[str, str]] = looks

    def differences(self, key: str, title: str, family: Sequence[Comparison]) -> Picture | None:
        """Every comparison of a family with its interval, and with that of the bootstrap."""
        shown = [entry for entry in family if entry.difference is not None]
        if not shown:
            return None
        picture = self._name(key, title, "paired differences with 95 % intervals; right of the line is better")
        size = (5.8, 1.1 + 0.36 * len(shown))
        with self._figure(picture, size) as axes:
            axes.axvline(0, color=_GREY, lw=1)
            for place, entry in enumerate(reversed(shown)):
                self._difference(axes, place, entry)
            labels = [f"{entry.task}: {entry.method} − {entry.baseline}" for entry in reversed(shown)]
            axes.set_yticks(range(len(shown)), labels)
            axes.set_xlabel("gain, in sd of the pairs")
            axes.set_ylim(-0.6, len(shown) - 0.4)
        return picture

    def _difference(self, axes: Any, place: int, entry: Comparison) -> None:
        """In units of the pairs' standard deviation: scores and losses of different tasks share an axis."""
        assert entry.difference is not None
        sign = -1.0 if entry.measure.lower_is_better else 1.0
        spread = _spread(entry.difference, len(entry.seeds))
        colour = {"better": _COLOURS[2], "worse": _COLOURS[1]}.get(entry.verdict, _COLOURS[0])
        if entry.resampled is not None and entry.with_rows:
            ends = np.array([entry.resampled.low, entry.resampled.high]) * sign / spread
            axes.plot(ends, [place, place], color=colour, lw=5, alpha=0.25, solid_capstyle="butt")
        ends = np.array([entry.difference.low, entry.difference.high]) * sign / spread
        axes.plot(ends, [place, place], color=colour, lw=1.8)
        filled = colour if entry.verdict in ("better", "worse") else "white"
        axes.plot(entry.difference.estimate * sign / spread, place, "o", color=colour, mfc=filled, ms=6)

    def losses(self, task: str) -> list[Picture]:
        """One panel a method: loss on the rows fitted on (dashed) and reported (solid), the baseline's in grey."""
        held = {method: self._histories(task, method) for method in self.study.plan.methods}
        held = {method: series for method, series in held.items() if series}
        base = next((name for name in self.study.plan.baselines if name in held), None)
        values = [point for series in held.values() for part in series.values() for point in part[1]]
        top = (min(values), max(values)) if values else (0.0, 1.0)
        # The baseline over the seeds that the method has: others are other training subsets.
        grounds = {method: self._histories(task, base, like=method) if base else {} for method in held}
        return [self._loss(task, method, series, grounds[method], base, top) for method, series in held.items()]

    def _loss(
        self,
        task: str,
        method: str,
        series: _Series,
        ground: _Series,
        base: str | None,
        top: tuple[float, float],
    ) -> Picture:
        title = f"{task}: {method}"
        picture = self._name(f"loss-{task}-{method}", title, "loss by epoch, fitted on (dashed) and reported (solid)")
        margin = 0.06 * (top[1] - top[0]) + 1e-9
        with self._figure(picture) as axes:
            if ground and base != method:
                for part, line in (("train", "--"), ("report", "-")):
                    axes.plot(*ground[part][:2], line, color="#9a9a9a", lw=1.2, label=f"{base}, {part}")
            colour = self.looks[method]["color"]
            for part, line in (("train", "--"), ("report", "-")):
                epochs, means, low, high = series[part]
                axes.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(epochs, means, line, color=colour, lw=2, label=f"{method}, {part}")
            axes.set_ylim(top[0] - margin, top[1] + margin)
            axes.set_xlabel("epoch")
            axes.set_ylabel("loss")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(frameon=False, fontsize=8)
        return picture

    def _histories(self, task: str, method: str, like: str | None = None) -> _Series:
        """``train`` and ``report`` -> (epochs, means, low, high) over the final runs that are done, of the seeds of ``like``."""
        seeds = {item.line.seed for item in self.study.finals(task, like or method) if item.done}
        finals = self.study.finals(task, method)
        runs = [item.line.history for item in finals if item.done and item.line.seed in seeds]
        if not runs:
            return {}
        epochs = range(min(map(len, runs)))
        found = {}
        for part in ("train", "report"):
            bands = [mean_interval([run[n][part]["loss"] for run in runs]) for n in epochs]
            low, high = ([_end(band, name) for band in bands] for name in ("low", "high"))
            found[part] = ([runs[0][n]["epoch"] for n in epochs], [band.estimate for band in bands], low, high)
        return found

    def curve(self, key: str) -> list[Picture]:
        """Two panels a task: the metric at the chosen epoch (the paper's curves behind it) and the last loss."""
        points, found = curve_points(self.study, key), []
        for task in self.study.plan.curves[key].tasks:
            own = [point for point in points if point["task"] == task and point["runs"]]
            if own:
                found += [self._curve(key, task, own, name) for name in ("metric", "loss")]
        return found

    def _curve(self, key: str, task: str, points: list[dict[str, Any]], name: str) -> Picture:
        kind, vary = self.study.plan.task_of(task), self.study.plan.curves[key].vary
        measure = Measure(kind.metric) if name == "metric" else Measure("loss", "last")
        scale = 100 if measure.write(1.0) == "100.00" else 1
        title = f"{task}: {measure.title} by {vary.replace('_', ' ')}"
        words = "mean and 95 % interval over seeds, one line a method"
        picture = self._name(f"curve-{key}-{task}-{measure.key}", title, words)
        with self._figure(picture) as axes:
            if name == "metric" and vary == "rate":
                self._paper_behind(axes, kind.name, points, scale)
            places = _places(axes, list(self.study.plan.curves[key].values))
            drawn = [method for method in self.looks if any(point["method"] == method for point in points)]
            for number, method in enumerate(drawn):
                own = [point for point in points if point["method"] == method]
                aside = (number - (len(drawn) - 1) / 2) * 0.012  # side by side, so that intervals can be told apart
                at = [places(point["value"], aside) for point in own]
                self._line(axes, at, [point[name] for point in own], scale, method, self.looks[method])
            axes.set_xlabel(vary.replace("_", " "))
            axes.set_ylabel(f"{measure.title}{', %' if scale == 100 else ''}")
            axes.figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8)
        return picture

    @staticmethod
    def _line(
        axes: Any, places: list[Any], bands: list[Interval], scale: float, label: str, look: Mapping[str, str]
    ) -> None:
        means = np.array([band.estimate for band in bands]) * scale
        below = means - np.array([_end(band, "low") for band in bands]) * scale
        above = np.array([_end(band, "high") for band in bands]) * scale - means
        axes.errorbar(places, means, yerr=[below, above], capsize=3, lw=1.8, elinewidth=1, ms=5, label=label, **look)

    def _paper_behind(self, axes: Any, task: str, points: list[dict[str, Any]], scale: float) -> None:
        """The paper's curves of the methods drawn, faint, on an axis of their own that counts points at the same scale."""
        names = {plan: known for known, plan in methods_of(self.study.plan).items()}
        drawn = {method: names[method] for method in dict.fromkeys(p["method"] for p in points) if method in names}
        theirs = {method: self.theirs.get(task, {}).get(name) for method, name in drawn.items()}
        lines = {method: np.array(line) for method, line in theirs.items() if line}
        if not lines:
            return
        ours = [_end(point["metric"], end) * scale for point in points for end in ("low", "high")]
        heights = np.concatenate([line[:, 1] for line in lines.values()])
        half = max(np.ptp(ours), np.ptp(heights), 1e-3) * 0.56
        axes.set_ylim(np.mean([min(ours), max(ours)]) - half, np.mean([min(ours), max(ours)]) + half)
        behind = axes.twinx()
        behind.set_ylim(np.mean([heights.min(), heights.max()]) - half, np.mean([heights.min(), heights.max()]) + half)
        for method, line in lines.items():
            behind.plot(*line.T, color=self.looks[method]["color"], lw=5, alpha=0.22, solid_capstyle="round")
        behind.set_ylabel("the paper's (broad, faint): RoBERTa-large, %", fontsize=8, color=_GREY)
        behind.tick_params(colors=_GREY, labelsize=8)
        behind.spines[["top"]].set_visible(False)
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)

    def _name(self, key: str, title: str, words: str) -> Picture:
        plain = re.sub(r"[^\w.=-]+", "-", f"{self.study.name}-{key}")
        name, number = f"{plain}.png", 1
        while (self.folder / name).exists():  # what other words leave of themselves, or of other tasks and methods
            number += 1
            name = f"{plain}-{number}.png"
        return Picture(f"{self.below}/{name}", title, f"{title}: {words}")

    @contextmanager
    def _figure(self, picture: Picture, size: tuple[float, float] = _SIZE) -> Iterator[Any]:
        figure, axes = self.plt.subplots(figsize=size, layout="constrained")
        axes.grid(True, alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(picture.title, loc="left", fontsize=11)
        try:
            yield axes
            figure.savefig(self.folder / Path(picture.path).name, dpi=120)
        finally:
            self.plt.close(figure)


_Series = dict[str, tuple[list[float], list[float], list[float], list[float]]]


def _places(axes: Any, values: list[Any]) -> Callable[[Any, float], float]:
    """Lay out the axis of a curve's values; returns (value, shift as a share of the axis) -> place.

    Numbers stand where they are, on a logarithmic axis where they span a factor of four; anything else side by side.
    """
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    ends = (min(values), max(values)) if numbers else (0, max(len(values) - 1, 1))
    log = numbers and ends[0] > 0 and ends[1] >= 4 * ends[0]
    axes.set_xscale("log" if log else "linear")
    ticks = values if numbers else list(range(len(values)))
    axes.set_xticks(ticks, [f"{value:g}" if isinstance(value, float) else str(value) for value in values])
    axes.minorticks_off()
    if log:
        return lambda value, shift: float(ticks[values.index(value)] * (ends[1] / ends[0]) ** shift)
    return lambda value, shift: float(ticks[values.index(value)] + shift * (ends[1] - ends[0]))


def _end(band: Interval, name: str) -> float:
    """An interval's end, or the estimate where a single run gives none."""
    value = float(getattr(band, name))
    return value if np.isfinite(value) else band.estimate


def _spread(band: Interval, count: int) -> float:
    """The standard deviation behind Student's interval of ``count`` values; 1 where there is none."""
    # Differences that are equal but for rounding have no spread to be shown in.
    if count < 2 or not band.high - band.low > 1e-9 * max(abs(band.high), abs(band.low)):
        return 1.0
    t = float(extra("scipy.stats").t.ppf(0.975, count - 1))
    return (band.high - band.low) / 2 / t * float(np.sqrt(count))
