"""Masks as people see them: blocks in the terminal, or a PNG with one panel a sample and head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import masks
from ..errors import ConfigError
from ..masks import MaskKey
from .extras import extra

_KEPT, _DROPPED = "#E8EEF4", "#D55E00"
_HALVES = {(True, True): "█", (True, False): "▀", (False, True): "▄", (False, False): " "}
_MOST_PANELS, _MOST_LENGTH, _MOST_PLACES = 64, 4096, 1 << 26
_GAP = 2


def drawn(
    pattern: str, key: MaskKey, samples: list[int], length: int, rate: float, heads: int = 1
) -> NDArray[np.bool_]:
    """The mask of one site, bool (samples, heads, length, length), True = keep; columns and spans reach down all rows.

    Raises:
        ConfigError: more than a picture can show, or what :mod:`hiddenkey_rs.masks` refuses. DataError: sample ids likewise.
    """
    if not 1 <= length <= _MOST_LENGTH:
        raise ConfigError(f"a picture's length must lie in 1..={_MOST_LENGTH} (got {length}); show a part of the mask")
    if not 1 <= heads * len(samples) <= _MOST_PANELS:
        raise ConfigError(
            f"a picture holds 1 to {_MOST_PANELS} panels (got {len(samples)} sample(s) of {heads} head(s)); show fewer"
        )
    if heads * len(samples) * length**2 > _MOST_PLACES:
        raise ConfigError(
            f"a picture holds at most {_MOST_PLACES} places (got {heads * len(samples)} panels of length {length}); show fewer"
        )
    if pattern == "element":
        return masks.element_bool(key, samples, length, length, rate, heads)
    if pattern == "column":
        bits = masks.column(key, samples, length, rate, heads)
    else:
        bits = masks.span(key, samples, [length] * len(samples), rate, heads)
    return np.broadcast_to(bits.to_bool(), (len(samples), heads, length, length))


def title(pattern: str, key: MaskKey, rate: float, keep: NDArray[np.bool_]) -> str:
    """One line on what is shown.

    Example:
        >>> title("column", MaskKey(), 0.1, np.ones((1, 1, 2, 2), dtype=bool))
        'column, attention of layer 0, rate 0.1 (realised 0.10001), kept 1.0000; seed 0, step 0, branch 0'
    """
    return (
        f"{pattern}, {key.site} of layer {key.layer}, rate {rate:g} (realised {masks.realised(rate):.5f}), "
        f"kept {keep.mean():.4f}; seed {key.seed}, step {key.step}, branch {key.branch}"
    )


def blocks(keep: NDArray[np.bool_], samples: list[int], width: int, unicode: bool) -> Iterator[str]:
    """Lines of text: a filled place is kept, a blank one (without Unicode, a dot) dropped. Panels stand side by side.

    Of masks wider than ``width`` the first columns and rows are shown. With Unicode a character is two rows high.
    """
    _, heads, length, _ = keep.shape
    shown = min(length, width)
    panels = [
        (f"sample {sample}, head {head}", one[head])
        for sample, one in zip(samples, keep, strict=True)
        for head in range(heads)
    ]
    cell = max(shown, *(len(name) for name, _ in panels)) if len(panels) > 1 else shown
    beside = max((width + _GAP) // (cell + _GAP), 1)
    space = " " * _GAP
    for start in range(0, len(panels), beside):
        row = panels[start : start + beside]
        drawings = [list(_lines(panel[:shown, :shown], unicode)) for _, panel in row]
        yield ""
        yield space.join(name.ljust(cell) for name, _ in row).rstrip()
        for parts in zip(*drawings, strict=True):
            yield space.join(part.ljust(cell) for part in parts).rstrip()
    yield ""
    note = "█ kept, blank dropped" if unicode else "# kept, . dropped"
    yield note if shown == length else f"{note}; the first {shown} of {length} rows and columns"


def _lines(panel: NDArray[np.bool_], unicode: bool) -> Iterator[str]:
    if not unicode:
        for row in panel:
            yield "".join("#" if keep else "." for keep in row)
        return
    if len(panel) % 2:
        panel = np.vstack([panel, np.zeros_like(panel[:1])])
    for upper, lower in zip(panel[::2], panel[1::2], strict=True):
        yield "".join(_HALVES[bool(a), bool(b)] for a, b in zip(upper, lower, strict=True))


def axis_names(pattern: str, site: str) -> tuple[str, str]:
    """What a mask's rows and columns are.

    Example:
        >>> axis_names("element", "attention"), axis_names("column", "ffn")
        (('query', 'key'), ('feature', 'token'))
    """
    if site.endswith("attention"):
        return "query", "key"
    return ("token", "feature") if pattern == "element" else ("feature", "token")


def draw(keep: NDArray[np.bool_], samples: list[int], path: str | Path, names: tuple[str, str], text: str) -> None:
    """One PNG: a line of panels a sample, a panel a head; what is dropped stands out. ``names``: :func:`axis_names`."""
    extra("matplotlib").use("Agg")
    plt = extra("matplotlib.pyplot")
    colours = extra("matplotlib.colors").ListedColormap([_DROPPED, _KEPT])
    count, heads, length, _ = keep.shape
    many = min(heads, 8)
    lines = count * -(-heads // many)
    figure, grid = plt.subplots(
        lines, many, figsize=(max(2.6 * many, 5.2), 2.9 * lines + 0.7), layout="constrained", squeeze=False
    )
    places: list[Any] = list(grid.ravel())
    for axes in places:
        axes.set_visible(False)
    for n in range(count):
        for head in range(heads):
            axes = places[n * many * -(-heads // many) + head]
            axes.set_visible(True)
            # no smoothing between neighbours: a place is kept or dropped
            axes.imshow(keep[n, head], cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
            axes.set_title(f"sample {samples[n]}, head {head}", fontsize=9)
            axes.set_xlabel(names[1])
            axes.set_ylabel(names[0])
            ticks = sorted({0, length // 2, length - 1})
            axes.set_xticks(ticks)
            axes.set_yticks(ticks)
    figure.legend(
        handles=[
            extra("matplotlib.patches").Patch(color=colour, label=label)
            for colour, label in ((_DROPPED, "dropped"), (_KEPT, "kept"))
        ],
        loc="outside lower right",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    head_line, _, rest = text.partition("; ")
    figure.suptitle(f"{head_line}\n{rest}", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
