"""Early stopping as a control: what it gains plain LoRA, and whether a method that does without it reaches that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .comparisons import Comparison, paired
from .measures import Measure
from .paper_tables import methods_of
from .render import NONE, Table
from .studies import Study
from .tables import pairs_text

CHOSEN, LAST = "chosen", "last"


def stops(study: Study) -> Iterator[Mapping[str, Comparison]]:
    """Per task and method, ``metric`` and ``loss`` -> a comparison with plain LoRA; none if the plan lacks plain LoRA.

    First plain LoRA at its chosen epoch less itself at its last; then every method of the family, and every other baseline,
    at its last epoch less plain LoRA at its chosen one.
    """
    plain = methods_of(study.plan).get("none")
    if plain is None:
        return
    others = [name for pair in study.plan.comparisons for name in pair if name != plain]
    for task in study.plan.tasks:
        names = {"metric": study.plan.task_of(task).metric, "loss": "loss"}
        for method in (plain, *dict.fromkeys(others)):
            ours, theirs = (CHOSEN, LAST) if method == plain else (LAST, CHOSEN)
            yield {
                key: paired(study, task, method, plain, Measure(name, ours), Measure(name, theirs))[0]
                for key, name in names.items()
            }


def early_stopping(study: Study) -> Table | None:
    """The differences of :func:`stops` with their intervals; ``None`` where there is none yet."""
    rows = []
    for found in stops(study):
        entry = found["metric"]
        if entry.difference is None:
            continue
        ours, theirs = (CHOSEN, LAST) if entry.method == entry.baseline else (LAST, CHOSEN)
        bands = [
            NONE if e.difference is None else e.measure.interval(e.difference, signed=True) for e in found.values()
        ]
        name = study.plan.task_of(entry.task).metric
        rows.append(
            (entry.task, f"{entry.method}, {ours} − {entry.baseline}, {theirs}", pairs_text(entry), name, *bands)
        )
    caption = (
        "Paired differences with their 95 % intervals, on the reported rows; not tested. The first row of a task is what early "
        "stopping gains plain LoRA; the others set a method that is trained to its last epoch against plain LoRA stopped early. "
        "An interval above 0 (of a loss or perplexity: below) is a gain that early stopping alone does not give; one that holds "
        "0 leaves it open, and one on the other side says that early stopping is the better of the two."
    )
    columns = ("task", "difference of epochs", "pairs", "metric", "its mean [95 %]", "loss, mean [95 %]")
    return (
        Table("early-stopping", "Stopped early, or trained to the end", caption, columns, tuple(rows)) if rows else None
    )
