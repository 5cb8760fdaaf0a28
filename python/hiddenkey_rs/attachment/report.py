"""What an attached model drops where: the report that :meth:`Handle.report` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .counts import Tally, read
from .sites import Site

if TYPE_CHECKING:
    from .handle import Handle

_COLUMNS = ("site", "layer", "module", "drops", "rate", "realised", "measured", "calls")


@dataclass(frozen=True)
class ReportRow:
    """One site in one layer. ``realised`` is t / 65536 of the rate; ``measured`` what was dropped so far."""

    site: str
    layer: int
    module: str
    drops: str
    rate: float
    realised: float
    measured: float | None
    calls: int


@dataclass(frozen=True)
class Report:
    """The sites of an attached model; ``str()`` is a table."""

    model: str
    family: str
    layers: int
    stock_dropout: str
    second_pass: str
    """How many layers run once for both passes of a two-pass loss, or why none does; empty if there is one pass."""
    rows: tuple[ReportRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.model} ({self.family}): {len(self.rows)} site(s) in {self.layers} layer(s) drop"
        lines = [f"{head}; the model's own dropout: {self.stock_dropout}"]
        lines += [f"second pass: {self.second_pass}"] if self.second_pass else []
        cells = [_COLUMNS, *(_cells(row) for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join(lines)


def build(handle: Handle) -> Report:
    """The report of a handle."""
    # A shared module (ALBERT) stands for many depths, and of several groups each plans all of them: each depth is one row,
    # under the module that ran it, or the last one.
    unique: dict[tuple[str, int], ReportRow] = {}
    for row in (_row(site, depth) for site in handle.sites for depth in sorted(site.drops)):
        before = unique.get((row.site, row.layer))
        if before is None or before.measured is None:
            unique[row.site, row.layer] = row
    stock = "off" if handle.stock.off else f"kept in {handle.stock.live} place(s)"
    base = handle.base
    depths = sum(stack.depths for stack in handle.stacks)
    second = _second_pass(handle, depths)
    return Report(type(base).__name__, base.config.model_type, depths, stock, second, tuple(unique.values()))


def _second_pass(handle: Handle, depths: int) -> str:
    part = handle.config.consistency
    if part is None or part.gradient == "both":
        return ""
    if handle.sharing.reason is not None:
        return f"runs all {depths} layers ({handle.sharing.reason})"
    return f"runs {depths - handle.sharing.count} of {depths} layers; the others run once for both"


def realised(sites: Iterable[Site]) -> dict[str, float]:
    """Dropped / allowed by site name, over all layers and calls counted so far."""
    return {name: dropped / allowed for name, (dropped, allowed) in counted(sites).items() if allowed}


def counted(sites: Iterable[Site]) -> dict[str, tuple[int, int]]:
    """(dropped, allowed) by site name, over all layers and calls counted so far."""
    totals: dict[str, tuple[int, int]] = {}
    found = [(site.site, tally) for site in sites for tally in site.counts.values()]
    for (name, _), (dropped, allowed) in zip(found, read([tally for _, tally in found]), strict=True):
        before = totals.get(name, (0, 0))
        totals[name] = (before[0] + dropped, before[1] + allowed)
    return totals


def _row(site: Site, depth: int) -> ReportRow:
    drop = site.drops[depth]
    [(dropped, allowed)] = read([site.counts.get(depth, Tally())])
    measured = dropped / allowed if allowed else None
    kind = drop.pattern if drop.position in ("input", "output") else f"{drop.position} {drop.pattern}"
    return ReportRow(site.site, depth, site.name, kind, drop.rate, drop.realised, measured, site.calls)


def _cells(row: ReportRow) -> tuple[str, ...]:
    measured = "-" if row.measured is None else f"{row.measured:.4f}"
    return (
        row.site,
        str(row.layer),
        row.module,
        row.drops,
        f"{row.rate:g}",
        f"{row.realised:.6f}",
        measured,
        str(row.calls),
    )
