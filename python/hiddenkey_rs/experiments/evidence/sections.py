"""What a report says, in order: sections of text, tables and pictures, the same for the page and for Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..sweep.plan import CURVE, FINAL, SEARCH, Protocol
from ..tasks import Task
from .comparisons import Comparison, family, losses, outcome
from .early_stopping import early_stopping
from .measures import Measure, at, tested_on
from .paper_tables import paper_tables
from .pictures import Pictures
from .render import Picture, Table
from .runs import cell_commands, costs, curve_table, run_commands
from .search import search_table, searched_rates, setting_text, unequal_rates
from .studies import Study
from .tables import coverage, detail, overview, rows_of, tests

_ALL = 100_000
"""Selection rows beyond any task's: what a plan writes for no limit."""
Block = str | Table | tuple[Picture, ...]


@dataclass(frozen=True)
class Section:
    """A part of the report. ``name`` is what a Markdown file asks for it by."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Family:
    """One corrected family: what is measured, in which words, and what came out."""

    key: str
    title: str
    caption: str
    found: list[Comparison]


_READING = (
    "Differences are method − baseline, paired by seed. p: two-sided sign flips over seeds, exact up to 20; Holm over all rows "
    "of a table, rows that lack runs included. The bootstrap draws seeds and reported rows at once (or seeds only, where the "
    "measure is no mean over rows); its p is Student's of the mean over their spread. Seeds for power .8, and what the pairs at "
    "hand detect with it: paired t test at alpha .05, and never fewer seeds than sign flips need for such a p; in brackets at "
    ".05 over the table's rows, as the strictest step of Holm's correction asks."
)
_CURVES = (
    "Means and 95 % intervals over the curve's seeds (of fewer than three runs: their range), on the reported rows. Broad and "
    "faint, where the paper has the method and the task: its figure 4, on the axis to the right, whose points are as tall as "
    "ours."
)
_FIRST = "The family that the plan fixed beforehand."
_SECOND = "Second to the family that the plan fixed beforehand, and corrected by itself."
_KINDS: Mapping[str, tuple[str, str, Callable[[Task], Measure | None]]] = {
    "metric": ("The metric, at the chosen epoch", "", lambda task: Measure(task.metric)),
    "metric-last": (
        "The metric, at the last epoch",
        "What training without early stopping would have kept. ",
        lambda task: Measure(task.metric, "last"),
    ),
    "loss-last": ("Loss at the last epoch", "", lambda _: Measure("loss", "last")),
    "loss-chosen": ("Loss at the chosen epoch", "", lambda _: Measure("loss")),
    "ece": (
        "Calibration at the chosen epoch",
        "",
        lambda task: Measure("ece") if task.kind == "classification" else None,
    ),
}


def families(study: Study) -> list[Family]:
    """The plan's comparisons on the measure that it is about, first, and on metric, losses and calibration, which explain it."""
    first = {"metric": "metric", "loss": "loss-chosen", "bleu": "bleu"}[study.plan.measure]
    written = {i.line.dataset for i in study.stage(FINAL) if i.done and "bleu" in at(i.line, "chosen")["report"]}

    def texts(task: Task) -> Measure | None:
        if first == "bleu":
            return tested_on(study.plan, task)
        return Measure("bleu") if task.name in written else None

    mixed = first == "bleu" and any(study.plan.task_of(task).kind != "lm" for task in study.plan.tasks)
    title = f"BLEU of texts generated at the chosen epoch{'; the metric, where a task has no texts' if mixed else ''}"
    kinds = {**_KINDS, "bleu": (title, "", texts)}
    every = []
    for key in sorted(kinds, key=lambda key: key != first):
        title, caption, of = kinds[key]
        every.append(Family(key, title, caption + (_FIRST if key == first else _SECOND), family(study, of)))
    return [entry for entry in every if entry.found]


def sections(study: Study, tested: list[Family], pictures: Pictures | None) -> list[Section]:
    """A study's sections. Without ``pictures`` none are drawn."""
    first = tested[0].found if tested else []
    stopped = early_stopping(study)
    tables = [detail(study, task, first) for task in study.plan.tasks]
    tests_ = [tests(study, f"tests-{entry.key}", entry.title, entry.caption, entry.found) for entry in tested]
    curves: list[Block] = []
    for key in study.plan.curves:
        if study.stage(CURVE):
            curves += [*([tuple(pictures.curve(key))] if pictures else []), curve_table(study, key)]
    found = [
        Section("outcome", "What came out", tuple(outcomes(study, tested))),
        Section("main", "Methods and tasks", (overview(study), *tables)),
        Section("early-stopping", "Early stopping", (stopped, overview(study, "last")) if stopped else ()),
        Section("tests", "Comparisons", (*_forests(pictures, tested), *([_READING] if tests_ else []), *tests_)),
        Section("paper", "Beside the paper", tuple(paper_tables(study))),
        Section("curves", "Curves", (_CURVES, *curves) if curves else ()),
        Section("losses", "Loss by epoch", _losses(study, pictures)),
        Section("search", "Search", (search_table(study) or (),)),
        Section("costs", "Cost", (costs(study),)),
        Section("run", "What was run", (*_state(study), coverage(study), rows_of(study), *_protocol(study))),
        Section("commands", "Commands", (cell_commands(study), run_commands(study))),
    ]
    return [section for section in found if any(section.blocks)]


def outcomes(study: Study, tested: list[Family]) -> list[str]:
    """The outcome in sentences: that of the first family, then the last loss', then what is missing."""
    by_key = {entry.key: entry.found for entry in tested}
    said = [
        *outcome(study, tested[0].found if tested else []),
        searched_rates(study) if tested else "",
        unequal_rates(study) if tested else "",
        losses(study, by_key.get("loss-last", [])),
    ]
    missing = [len(study.missing[stage]) for stage in (SEARCH, FINAL, CURVE)]
    if any(missing):
        total = sum(len(study.expected[stage]) for stage in (SEARCH, FINAL, CURVE))
        said.append(f"{study.name} is unfinished: {sum(missing)} of {total} trials are missing, see the table below.")
    return [sentence for sentence in said if sentence]


def _state(study: Study) -> list[str]:
    said = []
    if any(study.missing[stage] for stage in (SEARCH, FINAL, CURVE)):
        folder = study.folders[-1]
        said.append(
            "To go on: " + shlex.join(["hiddenkey", "sweep", f"{folder}/plan.yaml", "--out", folder, "--data", "DIR"])
        )
    if superseded := study.superseded():
        names = ", ".join(item.line.id for item in superseded)
        said.append(
            "Runs of settings that the search did not choose in the end, or of seeds that the plan does not have, counted "
            f"nowhere: {names}."
        )
    return said


def _protocol(study: Study) -> list[str]:
    plan, protocol = study.plan, study.plan.protocol
    settings = len(next(iter(plan.methods.values())).settings)
    source = (
        "one half of the development rows" if protocol.select_from == "dev" else "training rows that no subset contains"
    )
    rest = "the other half" if protocol.select_from == "dev" else "the development rows"
    rest += " and labelled test rows" if protocol.report_test else ""
    rest += "" if protocol.report_rows is None else f" (at most {protocol.report_rows} of them)"
    looks = "after every epoch" if protocol.looks is None else f"{protocol.looks} times, evenly over the epochs"
    by = "the task's metric" if protocol.select_by == "metric" else protocol.select_by
    base = dict(plan.base)
    lines = [item.line for item in study.found.values()]
    versions = sorted({f"{name} {value}" for line in lines for name, value in line.versions.items()})
    machines, commits = (
        sorted({line.machine for line in lines} - {""}),
        sorted({str(line.commit or "unknown") for line in lines}),
    )
    return [
        f"Protocol: every method searches {settings} settings on seeds {_list(protocol.search_seeds)}; the best mean by {by} on "
        f"{_selection(protocol)} ({source}) is run on seeds {_list(protocol.final_seeds)}. A seed decides "
        f"training subset, order and initial weights, the same for all methods. Rows held back are looked at {looks}; "
        f"the epoch is chosen on the selection rows. Reported are {rest}, which choose nothing and which a search does not see."
        f"{' ' if (rates := searched_rates(study)) else ''}{rates}",
        f"All runs start from: {setting_text(base)}.",
        f"Run with {', '.join(versions) or 'unknown versions'} on {'; '.join(machines) or 'an unknown machine'}; commit "
        f"{', '.join(commits)}. Plan {plan.name}, digest {plan.digest}.",
    ]


def _selection(protocol: Protocol) -> str:
    """How many rows choose: of training rows exactly so many (else a run is refused), of half the development rows at most."""
    if protocol.select_from != "dev":
        return f"{protocol.select_rows} selection rows"
    return "all selection rows" if protocol.select_rows >= _ALL else f"at most {protocol.select_rows} selection rows"


def _forests(pictures: Pictures | None, tested: list[Family]) -> list[Block]:
    drawn = [pictures.differences(f"differences-{e.key}", e.title, e.found) for e in tested] if pictures else []
    kept = tuple(picture for picture in drawn if picture is not None)
    words = (
        "Lines: Student's interval over seeds; broad and faint: the bootstrap's over seeds and rows. Filled: corrected p < .05, "
        "green better, orange worse."
    )
    return [kept, words] if kept else []


def _losses(study: Study, pictures: Pictures | None) -> tuple[Block, ...]:
    if pictures is None:
        return ()
    drawn = [tuple(pictures.losses(task)) for task in study.plan.tasks]
    words = "Means over final seeds with the 95 % interval; dashed: rows fitted on, solid: reported rows; grey: the baseline."
    return (words, *(panels for panels in drawn if panels)) if any(drawn) else ()


def _list(seeds: tuple[int, ...]) -> str:
    """Seeds, a run of them by its ends."""
    whole = len(seeds) > 2 and seeds == tuple(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))
