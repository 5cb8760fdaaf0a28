"""The report: what it claims follows from its lines, what is missing is said, and what does not belong is refused."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hiddenkey_rs as hk
from evidence_cases import SEEDS, TEXT, failed, write_study
from hiddenkey_rs.experiments.evidence import paper
from hiddenkey_rs.experiments.evidence.comparisons import compare, family, outcome
from hiddenkey_rs.experiments.evidence.measures import Measure, values
from hiddenkey_rs.experiments.evidence.paper_tables import methods_of, paper_tables
from hiddenkey_rs.experiments.evidence.render import Table, markdown
from hiddenkey_rs.experiments.evidence.render import html as as_html
from hiddenkey_rs.experiments.evidence.sections import families, outcomes, sections
from hiddenkey_rs.experiments.evidence.studies import Study, read_studies
from hiddenkey_rs.experiments.evidence.tables import cell_commands, costs, coverage, curve_points, detail, overview
from hiddenkey_rs.experiments.evidence.writing import filled, write_report
from hiddenkey_rs.experiments.statistics import sign_flip
from hiddenkey_rs.experiments.sweep.lines import ResultLine, numbered_lines, pack_examples

ACCURACY = Measure("accuracy")
Change = Callable[[ResultLine], ResultLine | None]


def study_in(folder: Path, gain: dict[str, float], text: str = TEXT, change: Change = lambda line: line) -> Study:
    write_study(folder, gain, text, change)
    return read_studies([folder])[0]


def metric_family(study: Study) -> list:
    return family(study, lambda task: Measure(task.metric))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "finished"
    write_study(folder, {"hiddenkey": 0.03})
    return folder


@pytest.fixture(scope="module")
def study(finished: Path) -> Study:
    return read_studies([finished])[0]


@pytest.fixture(scope="module")
def report(finished: Path) -> Path:
    figure = {"MRPC": {"baseline": [[0.01, 90.0], [0.2, 90.0]], "dropkey_column": [[0.01, 90.0], [0.2, 90.9]]}}
    (finished.parent / "data").mkdir()
    (finished.parent / "data" / "paper_fig4.json").write_text(json.dumps(figure))
    out = finished.parent / "out"
    write_report([finished], out, str(finished.parent / "data"))
    return out


def test_the_outcome_is_that_of_the_lines(study: Study) -> None:
    found = metric_family(study)
    assert [(e.task, e.method, e.baseline) for e in found] == [
        (task, "hiddenkey", baseline) for task in ("mrpc-1000", "stsb-500") for baseline in ("none", "lora-dropout")
    ]
    assert all(entry.verdict == "better" for entry in found)
    said, how = outcome(study, found)
    assert (
        said
        == "synthetic: 'hiddenkey' is better than 'none' on 2 of 2 tasks and 'lora-dropout' on 2 of 2 tasks, than both on 2."
    )
    assert "accuracy and pearson" in how
    assert "over 4 comparisons" in how


def test_a_comparison_is_made_of_pairs(study: Study) -> None:
    entry = compare(study, "mrpc-1000", "hiddenkey", "none", ACCURACY, size=4)
    ours, theirs = ({i.line.seed: i for i in study.finals("mrpc-1000", name)} for name in ("hiddenkey", "none"))
    by_hand = []
    for seed in SEEDS:
        left, right = (held[seed].line.history[1]["report"]["accuracy"] for held in (ours, theirs))
        by_hand.append(left - right)
    assert entry.difference is not None
    assert entry.difference.estimate == pytest.approx(np.mean(by_hand))
    assert entry.p == sign_flip(by_hand) == 2 / 2**12
    assert entry.with_rows
    assert entry.resampled is not None
    assert entry.resampled.estimate == pytest.approx(np.mean(by_hand))  # rows and figures agree
    assert entry.needed[0] is not None
    assert entry.needed[1] is not None
    assert entry.needed[0] < entry.needed[1]  # a corrected alpha takes more seeds
    assert [e.corrected for e in metric_family(study)] == [pytest.approx(4 * 2 / 2**12)] * 4
    pearson = compare(study, "stsb-500", "hiddenkey", "none", Measure("pearson"))
    assert not pearson.with_rows  # a correlation is no mean over rows
    lower = compare(study, "mrpc-1000", "hiddenkey", "none", Measure("loss", "last"))
    assert lower.difference is not None
    assert lower.difference.estimate < 0 < lower.gain


@pytest.mark.parametrize(
    ("gain", "sentence"),
    [
        (0.0, "'hiddenkey' is not shown to be better than 'none' or 'lora-dropout' on any of 2 tasks."),
        (-0.05, "on any of 2 tasks, and worse than 'none' on 2 and 'lora-dropout' on 2."),
    ],
)
def test_no_gain_is_what_the_first_sentence_says(gain: float, sentence: str, tmp_path: Path) -> None:
    study = study_in(tmp_path, {"hiddenkey": gain})
    assert outcome(study, metric_family(study))[0].endswith(sentence)


def test_ties_show_nothing(tmp_path: Path) -> None:
    """The same figures for every method: differences of 0, p = 1, no effect size, infinitely many seeds."""
    study = study_in(tmp_path, {}, change=_same)
    found = metric_family(study)
    assert {entry.p for entry in found} == {1.0}
    assert {entry.verdict for entry in found} == {"no difference shown"}
    assert all(entry.needed == (None, None) for entry in found)
    assert "is not shown to be better" in outcome(study, found)[0]
    text = markdown(detail(study, "mrpc-1000", found))
    assert "+0.00 [+0.00, +0.00] p 1.000; ∞ seeds" in text


def _same(line: ResultLine) -> ResultLine:
    if line.stage != "final":
        return line
    figures = {"loss": 0.5, line.metric: 0.8, "ece": 0.1}
    entry = {"epoch": 1, "step": 1, "train": figures, "select": figures, "report": figures}
    packed = pack_examples(np.array([True] * 4 + [False]), np.full(5, 0.5))
    return dataclasses.replace(line, history=[entry], chosen=0, examples=dict.fromkeys(("chosen", "last"), packed))


def test_rows_are_needed_only_where_they_count(tmp_path: Path) -> None:
    study = study_in(tmp_path, {}, change=lambda line: dataclasses.replace(line, examples={}))
    assert compare(study, "stsb-500", "hiddenkey", "none", Measure("pearson")).p is not None
    with pytest.raises(hk.DataError, match=r"holds no outcomes of rows .*results.jsonl, line \d+"):
        metric_family(study)


def test_a_family_is_open_until_its_runs_have_come_in(tmp_path: Path) -> None:
    """Four pairs that are missing: no p, a place in the family all the same, and the command to go on with."""

    def drop(line: ResultLine) -> ResultLine | None:
        missing = line.stage == "final" and line.task == "mrpc-1000" and line.method == "none" and line.seed >= 108
        return None if missing else line

    study = study_in(tmp_path, {"hiddenkey": 0.03}, change=drop)
    found = metric_family(study)
    open_, *rest = found
    assert (open_.verdict, open_.p, open_.corrected, len(open_.seeds), open_.settled) == (
        "unfinished",
        None,
        None,
        8,
        8,
    )
    assert open_.difference is not None  # said, but not tested
    assert [entry.corrected for entry in rest] == [pytest.approx(4 * 2 / 2**12)] * 3
    assert outcome(study, found)[0] == (
        "synthetic: 'hiddenkey' is better than 'none' on 1 of 2 tasks and 'lora-dropout' on 2 of 2 tasks, than both on 1; "
        "1 of 4 comparisons lack runs."
    )
    assert "synthetic is unfinished: 4 of 152 trials are missing" in outcomes(study, families(study))[-1]
    assert [name for _, name in study.missing["final"]] == [
        f"mrpc-1000/none/1/{seed}/final" for seed in range(108, 112)
    ]
    rows = {row[:2]: row for row in coverage(study).rows}
    assert rows["mrpc-1000", "none"] == ("mrpc-1000", "none", "2/2", "8/12", "6/6", "0", "missing: final")
    assert rows["stsb-500", "none"][-1] == "complete"
    text = markdown(detail(study, "mrpc-1000", found))
    assert "] unfinished |" in text
    assert " (8 seeds) |" in markdown(overview(study))
    assert any(f"hiddenkey sweep {tmp_path}" in str(block) for block in sections(study, [], None)[1].blocks)


def test_an_unfinished_search_is_said(tmp_path: Path) -> None:
    study = study_in(tmp_path, {}, change=lambda line: line if line.id == "mrpc-1000/none/0/0/search" else None)
    assert study.settings == {}
    assert outcome(study, metric_family(study)) == ["synthetic: nothing can be said yet, 4 of 4 comparisons lack runs."]
    assert {name for _, name in study.missing["final"]} == {None}
    assert "| none | – | – |" in markdown(overview(study))
    write_report([tmp_path], tmp_path / "out")  # nothing of it needs what is not there
    assert "nothing can be said yet" in (tmp_path / "out" / "index.html").read_text()


def test_final_runs_without_their_search_are_provisional(tmp_path: Path) -> None:
    study = study_in(tmp_path, {"hiddenkey": 0.03}, change=lambda line: line if line.stage == "final" else None)
    assert len(study.provisional) == 10
    assert {entry.verdict for entry in metric_family(study)} == {"unfinished"}
    assert all("setting provisional" in row[-1] for row in coverage(study).rows)


def test_runs_of_a_setting_that_was_not_chosen_count_nowhere(tmp_path: Path) -> None:
    def change(line: ResultLine) -> ResultLine:
        if line.id == "mrpc-1000/hiddenkey/1/100/final":
            return dataclasses.replace(line, id="mrpc-1000/hiddenkey/0/100/final", setting={"rate": 0.05})
        if line.id == "mrpc-1000/hiddenkey/rank=4/0/grid":
            return dataclasses.replace(line, setting={"rate": 0.05, "rank": 4})
        return line

    study = study_in(tmp_path, {}, change=change)
    names = ["mrpc-1000/hiddenkey/0/100/final", "mrpc-1000/hiddenkey/rank=4/0/grid"]
    assert [item.line.id for item in study.superseded()] == names
    assert len(study.finals("mrpc-1000", "hiddenkey")) == 11
    point = next(p for p in curve_points(study, "ranks") if (p["method"], p["value"]) == ("hiddenkey", 4))
    assert point["runs"] == 1
    assert any(names[0] in str(block) for block in sections(study, [], None)[1].blocks)


def test_a_diverged_run_is_shown_and_leaves_its_pair_out(tmp_path: Path) -> None:
    diverged, died = "mrpc-1000/hiddenkey/1/103/final", "stsb-500/none/1/104/final"

    def change(line: ResultLine) -> ResultLine:
        return failed(line) if line.id == diverged else failed(line, None) if line.id == died else line

    study = study_in(tmp_path, {"hiddenkey": 0.03}, change=change)
    found = metric_family(study)
    assert [len(entry.seeds) for entry in found] == [11, 11, 11, 12]
    assert found[0].p == 2 / 2**11
    assert 103 not in found[0].seeds
    states = " ".join(row[-1] for row in coverage(study).rows)
    assert f"{diverged} diverged at step 7" in states
    assert f"{died} failed: out of memory" in states


def test_too_few_seeds_are_called_that(tmp_path: Path) -> None:
    text = TEXT.replace("110, 111]", "]").replace("final_seeds: [100, 101, 102, 103, 104, 105, ", "final_seeds: [")
    study = study_in(tmp_path, {"hiddenkey": 0.1}, text)
    assert len(study.plan.protocol.final_seeds) == 4
    *_, few = outcome(study, metric_family(study))
    assert few == "No comparison can reach that p with the 4 seeds planned, whatever the differences are."
    assert len(outcome(study_in(tmp_path / "b", {}), metric_family(study))) == 3


def test_no_family_is_no_claim(tmp_path: Path) -> None:
    text = re.sub(r"^comparisons.*\n", "", TEXT, flags=re.MULTILINE)
    study = study_in(tmp_path, {"hiddenkey": 0.1}, text)
    assert families(study) == []
    assert outcomes(study, []) == ["synthetic: the plan fixed no family of comparisons, so nothing is tested here."]


def test_tables_say_what_the_lines_say(study: Study) -> None:
    accuracies = values(ACCURACY, study.finals("mrpc-1000", "none"))
    assert len(accuracies) == 12
    mean = f"{100 * np.mean(list(accuracies.values())):.2f}"
    assert f"| none | {mean} ± " in markdown(overview(study))
    row = next(row for row in detail(study, "mrpc-1000", []).rows if row[0] == "none")
    assert row[:3] == ("none", "lr 0.001", "12")
    losses = [item.line.history[-1] for item in study.finals("mrpc-1000", "none")]
    assert row[5].startswith(f"{np.mean([e['report']['loss'] for e in losses]):.3f} ± ")
    assert row[6].startswith(f"{np.mean([e['report']['loss'] - e['train']['loss'] for e in losses]):.3f} ± ")
    assert row[-2] == ""  # no difference to itself
    gap = Measure("accuracy", "last", gap=True)
    item = study.finals("mrpc-1000", "none")[0]
    entry = item.line.history[-1]
    assert gap.of(item) == pytest.approx(entry["train"]["accuracy"] - entry["report"]["accuracy"])
    cost = {row[:2]: row for row in costs(study).rows}
    assert cost["mrpc-1000", "hiddenkey"][2:] == ("0.15", "1.50", "320", "900", "60", "12")
    command = dict(row[:2] for row in cell_commands(study).rows)["mrpc-1000: hiddenkey"]
    assert command == "hiddenkey sweep plan.yaml --out runs/s --only mrpc-1000/hiddenkey/1/100/final"
    point = next(p for p in curve_points(study, "ranks") if (p["method"], p["value"]) == ("none", 16))
    assert point["runs"] == 2
    assert point["metric"].low <= point["metric"].estimate <= point["metric"].high


def test_figures_are_written_as_a_reader_expects() -> None:
    assert ACCURACY.write(0.81234) == "81.23"
    assert ACCURACY.write(-0.012, signed=True) == "−1.20"
    assert Measure("loss").write(0.69314) == "0.693"
    assert Measure("bleu").write(68.5) == "68.50"
    assert Measure("loss").write(None) == Measure("loss").write(float("nan")) == "–"
    assert [Measure(name).lower_is_better for name in ("accuracy", "loss", "ece", "ter", "bleu", "perplexity")] == [
        False, True, True, True, False, True,
    ]  # fmt: skip


def test_the_papers_cells_have_the_papers_means() -> None:
    """As printed, and the two that the paper prints wrongly as its cells have them."""
    means = (90.60, 91.43, 91.26, 91.37, 91.59, 91.69, 91.35, 90.89, 90.94, 91.14, 91.78, 92.01, 91.77, 91.91, 91.70)
    for (method, row), mean in zip(paper.ROBERTA.items(), means, strict=True):
        assert np.mean([cell[0] for cell in row.values()]) == pytest.approx(mean, abs=0.0051), method
    assert set(paper.ROBERTA) == set(hk.PRESETS) - {"r-drop"}
    assert paper.score("none", "sst2") == (95.99, 0.25)
    assert paper.score("none", "cola") == (67.96, None)
    assert paper.score("hiddenkey", "mrpc", "meta/Llama-2-7b") == (89.46, None)
    assert paper.score("dropkey-column", "cola") is paper.score("none", "webnlg-category") is None


def test_the_papers_methods_are_found_by_what_they_drop(study: Study) -> None:
    # low-rank and lora-dropout drop nothing of ours either: they are controls, and not the paper's first row
    assert methods_of(study.plan) == {
        "none": "none", "dropkey-column": "dropkey-column", "hiddenkey": "hiddenkey",
    }  # fmt: skip
    single, compensation = paper_tables(study)
    assert single.columns == ("method", "mrpc-1000, ours", "mrpc, paper", "stsb-500, ours", "stsb, paper")
    assert [row[0] for row in single.rows] == ["none", "dropkey-column"]
    assert single.rows[1][2] == "90.93 (0.40)"
    assert compensation.rows[1][4] == "92.30 (0.11)"


TEXTS = """\
name: texts
protocol: {search_seeds: [0], final_seeds: [1, 2, 3]}
base: {model: gpt2-tiny, epochs: 3}
tasks: {e2e: {task: e2e, train_size: 500}}
methods:
  plain: {preset: none, settings: [{lr: 1.0e-3}, {lr: 2.0e-3}]}
  hiddenkey: {preset: hiddenkey, settings: [{rate: 0.05}, {rate: 0.1}]}
comparisons: {baselines: [plain], against: [hiddenkey]}
"""


def test_generated_texts_stand_beside_the_papers(tmp_path: Path) -> None:
    def texts(line: ResultLine) -> ResultLine:
        history = [{**e, "report": {**e["report"], "bleu": 60.0 + line.seed, "ter": 40.0}} for e in line.history]
        return dataclasses.replace(line, history=history)

    study = study_in(tmp_path / "with", {}, TEXTS, texts)
    (table,) = paper_tables(study)
    assert table.columns == ("method", "perplexity", "bleu, ours", "bleu, paper", "ter")
    assert [row[2:] for row in table.rows] == [
        ("62.00 (1.00)", "68.5", "40.00 (0.00)"),
        ("62.00 (1.00)", "69.76", "40.00 (0.00)"),
    ]
    assert paper_tables(study_in(tmp_path / "without", {}, TEXTS)) == []
    assert metric_family(study)[0].measure.lower_is_better


class _Page(html.parser.HTMLParser):
    """Counts of tags, what they refer to, and that they close in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.refers: list[str] = []
        self.ids: list[str] = []
        self.bare_pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        held = dict(attrs)
        self.refers += [str(held[name]) for name in ("src", "href") if name in held]
        self.ids += [str(held["id"])] if "id" in held else []
        self.bare_pictures += tag == "img" and not held.get("alt")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.counts["h1"] == 1
    assert "script" not in page.counts
    assert "link" not in page.counts
    assert page.bare_pictures == 0
    inside = [ref for ref in page.refers if ref.startswith("#")]
    assert {ref[1:] for ref in inside} == set(page.ids)
    assert all(ref.startswith("data:image/png;base64,") for ref in page.refers if not ref.startswith("#"))
    assert "url(" not in text
    assert "@import" not in text
    body = text.partition("<h1>")[2]
    assert body.startswith("synthetic: &#x27;hiddenkey&#x27; is better than")
    # 4 families of differences, 2 curves x 1 task x 2, 2 tasks x 5 methods of losses
    assert page.counts["img"] == len(list((report / "pictures").iterdir())) == 4 + 4 + 10
    for heading in ("Trials", "Scores", "mrpc-1000: all figures", "As in the paper: Compensation", "Cost", "Every run"):
        assert f"<h3>{heading}</h3>" in text
    assert text.count("--only") >= 152  # every run's command


def test_the_files_beside_the_page(report: Path, study: Study) -> None:
    rows = list(csv.DictReader((report / "tables" / "runs.csv").open()))
    assert len(rows) == len(study.found) == 152
    first = study.found[rows[0]["id"]]
    assert float(rows[0]["report_accuracy_chosen"]) == first.line.history[1]["report"]["accuracy"]
    assert rows[0]["line"] == first.place
    compared = list(csv.DictReader((report / "tables" / "comparisons.csv").open()))
    assert {row["family"] for row in compared} == {"metric", "loss-last", "loss-chosen", "ece"}
    assert float(compared[0]["p"]) == 2 / 2**12
    cells = list(csv.DictReader((report / "tables" / "cells.csv").open()))
    assert len(cells) == 5 * (5 + 4)  # methods x measures; a regression has no calibration
    assert len(list(csv.DictReader((report / "tables" / "epochs.csv").open()))) == 152 * 3
    assert len(list(csv.DictReader((report / "tables" / "curves.csv").open()))) == 2 * 3 + 2 * 3
    told = (report / "report.md").read_text()
    for path in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", told):
        assert (report / path).read_bytes().startswith(b"\x89PNG")
    assert told.index("is better than") < told.index("## What was run")


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    write_study(tmp_path / "results", {}, TEXTS)
    out = tmp_path / "out"
    write_report([tmp_path / "results"], out)
    stale = out / "pictures" / "stale.png"
    stale.write_bytes(b"")
    write_report([tmp_path / "results"], out)
    assert not stale.exists()
    assert (out / "index.html").is_file()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(hk.StateError, match="report's folder holds other files"):
        write_report([tmp_path / "results"], tmp_path)
    with pytest.raises(hk.StateError, match="is a file"):
        write_report([tmp_path / "results"], tmp_path / "notes.txt")


def test_parts_of_a_markdown_file_are_written_anew(study: Study, tmp_path: Path) -> None:
    told = [(study.name, sections(study, families(study), None))]
    file = tmp_path / "RESULTS.md"
    prose = "# Results\n\nMine.\n\n<!-- report outcome -->\nold\n<!-- /report -->\n\nAlso mine.\n"
    file.write_text(prose + "<!-- report synthetic/tests -->\n<!-- /report -->\nEnd.\n")
    for _ in range(2):  # writing twice changes nothing
        text = filled(file, told)
        assert text.startswith("# Results\n\nMine.\n\n<!-- report outcome -->\n\nsynthetic: 'hiddenkey' is better")
        assert "old" not in text
        assert "\n<!-- /report -->\n\nAlso mine.\n<!-- report synthetic/tests -->\n" in text
        assert text.endswith("<!-- /report -->\nEnd.\n")
        assert text.count("| mrpc-1000 | hiddenkey − none | better | 12 |") == 4
        file.write_text(text)
    unknown = "\n<!-- report nonsense -->\n<!-- /report -->"
    for bad, message in (
        ("nothing", "has no place for a report"),
        (unknown, r"no such section \(got 'nonsense' in .*line 2\); use one of outcome, "),
        ("<!-- report other/main -->\n<!-- /report -->", "no such section"),
        ("<!-- report main -->\n", r"not closed \(got .*line 1\)"),
        ("<!-- report main -->\n<!-- report run -->\n<!-- /report -->", r"not closed \(got .*line 1\)"),
    ):
        file.write_text(bad)
        with pytest.raises(hk.DataError, match=message):
            filled(file, told)
    with pytest.raises(hk.DataError, match="no Markdown file to fill"):
        filled(tmp_path / "none.md", told)


def test_what_is_refused_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_study(tmp_path / "results", {}, TEXTS)
    (tmp_path / "R.md").write_text("nothing")
    with pytest.raises(hk.DataError, match="has no place"):
        write_report([tmp_path / "results"], out=tmp_path / "never", results=tmp_path / "R.md")
    (tmp_path / "paper_fig4.json").write_text("[")
    with pytest.raises(hk.DataError, match="curves cannot be read"):
        write_report([tmp_path / "results"], out=tmp_path / "never", data=str(tmp_path))
    assert not (tmp_path / "never").exists()


def test_folders_of_one_plan_are_one_study_and_of_several_plans_several(tmp_path: Path) -> None:
    half: Change = lambda line: line if line.seed % 2 else None  # noqa: E731
    other: Change = lambda line: None if line.seed % 2 else line  # noqa: E731
    for name, change in (("a", half), ("b", other)):
        write_study(tmp_path / name, {"hiddenkey": 0.03}, change=change)
    write_study(tmp_path / "c", {}, TEXTS)
    first, second = read_studies([tmp_path / name for name in "abc"])
    assert first.folders == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert len(first.found) == 152
    assert not any(first.missing.values())
    assert second.name == "texts"
    write_report([tmp_path / name for name in "abc"], tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    assert "<h2>synthetic: Cost</h2>" in text
    assert "<h2>texts: Cost</h2>" in text
    write_study(tmp_path / "d", {}, TEXTS.replace("500", "501"))
    with pytest.raises(hk.DataError, match=r"two plans go by one name \(got 'texts' again in .*d'"):
        read_studies([tmp_path / "c", tmp_path / "d"])


def _lines(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    file = folder / "results.jsonl"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")


def _edited(number: int, **values: object) -> Callable[[list[str]], list[str]]:
    def change(rows: list[str]) -> list[str]:
        rows[number - 1] = json.dumps({**json.loads(rows[number - 1]), **values})
        return rows

    return change


REFUSED = [
    (_edited(3, plan="another"), r"different plans lie in one folder \(got plan another in .*results.jsonl, line 3, and"),
    (_edited(5, task="rte"), r"none of its plan's trials \(got .*line 5\); remove the line"),
    (_edited(5, history=[{"epoch": 1, "train": {}, "select": {}, "report": {}}], chosen=0),
     r"lacks a figure \(got no loss of train rows in epoch 1 of '.*', .*results.jsonl, line 5\); run the trial again"),
    (_edited(4, chosen=9), r"no result \(got .*line 4: epoch 9 is chosen of 3\)"),
    (_edited(4, status="dnoe"), r"no result \(got .*line 4: status 'dnoe'\)"),
    (_edited(4, history=7), r"no result \(got .*line 4: history is no list of objects\)"),
    (lambda rows: [*rows[:1], "nonsense", *rows[1:]], r"no JSON \(got .*line 2\); remove the line"),
    (lambda rows: [], r"holds no results yet"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_belong_is_refused(
    change: Callable[[list[str]], list[str]], message: str, tmp_path: Path
) -> None:
    write_study(tmp_path, {}, TEXTS)
    _lines(tmp_path, change)
    with pytest.raises(hk.DataError, match=message):
        read_studies([tmp_path])


def test_a_lacking_metric_is_named(tmp_path: Path) -> None:
    write_study(tmp_path, {}, change=lambda line: line if line.stage == "search" else None)
    history = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["history"]
    del history[2]["report"]["accuracy"]
    _lines(tmp_path, _edited(1, history=history))
    with pytest.raises(
        hk.DataError, match=r"got no accuracy of report rows in epoch 3 of 'mrpc-1000/none/0/0/search', .*line 1"
    ):
        read_studies([tmp_path])


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(hk.DataError, match=r"holds no results \(got .* without results.jsonl\)"):
        read_studies([tmp_path])
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(hk.DataError, match="results lack their plan"):
        read_studies([tmp_path])


def test_different_rows_cannot_be_compared(tmp_path: Path) -> None:
    def fewer(line: ResultLine) -> ResultLine:
        packed = {"correct": None, "loss": ""}
        strange = line.id == "mrpc-1000/none/1/105/final"
        return (
            dataclasses.replace(line, examples={"chosen": {**packed, "correct": ""}, "last": packed})
            if strange
            else line
        )

    study = study_in(tmp_path, {}, change=fewer)
    with pytest.raises(hk.DataError, match=r"reported on different rows \(got \[400, .*0, .*mrpc-1000/none"):
        metric_family(study)


def test_torn_lines_are_left_out_wherever_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path, {}, TEXTS)
    _lines(tmp_path, lambda rows: [rows[0], rows[1][:50], *rows[2:]])
    found = numbered_lines(tmp_path / "results.jsonl")
    assert 2 not in found
    assert list(found)[:2] == [1, 3]
    assert "line 2 is torn" in capsys.readouterr().err
    assert "loss" in next(iter(found.values())).history[0]["report"]


@pytest.mark.parametrize(
    "bad", ["[1]", '{"RTE": 3}', '{"RTE": {"baseline": [[1]]}}', '{"RTE": {"baseline": [["x", 1]]}}', "{"]
)
def test_a_spoilt_figure_of_the_paper_is_refused(bad: str, tmp_path: Path) -> None:
    (tmp_path / "paper_fig4.json").write_text(bad)
    with pytest.raises(hk.DataError, match=r"the paper's curves cannot be read \(got .*paper_fig4.json"):
        paper.figure_4(tmp_path)


def test_the_papers_figure_goes_by_our_names(tmp_path: Path) -> None:
    figure = {"STSB": {"baseline": [[0.1, 92]], "dropattn_span": [[0.1, 91.5]], "hiddencut_element": [[0.1, 92.0]]}}
    (tmp_path / "paper_fig4.json").write_text(json.dumps(figure))
    found = paper.figure_4(tmp_path)
    assert set(found["stsb"]) == {"none", "dropattention-span", "hiddencut-element"} <= set(hk.PRESETS)
    assert found["stsb"]["dropattention-span"] == [(0.1, 91.5)]
    assert paper.figure_4(tmp_path / "nowhere") == paper.figure_4(None) == {}


def test_tables_survive_what_people_write() -> None:
    table = Table("t", "a <b>", "x & y", ("n", "v|w"), (("<i>", "a|b"), ("r", "hiddenkey sweep 'p'"), ("s", "better")))
    text = as_html(table)
    assert "<b>" not in text
    assert "<i>" not in text
    assert "x &amp; y" in text
    assert '<td class="words better">better</td>' in text
    assert "<code>hiddenkey sweep" in text
    assert "| <i> | a\\|b |" in markdown(table)
    assert "| r | `hiddenkey sweep 'p'` |" in markdown(table)


def test_the_command(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hiddenkey_rs", "report"]
    done = subprocess.run([*command, str(finished)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "give --out DIR" in done.stderr
    done = subprocess.run(
        [*command, str(tmp_path), "--out", str(tmp_path / "o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "the folder holds no results" in done.stderr
    (tmp_path / "R.md").write_text("<!-- report main -->\n<!-- /report -->\n")
    done = subprocess.run(
        [*command, str(finished), "--markdown", str(tmp_path / "R.md")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("synthetic: 'hiddenkey' is better than 'none' on 2 of 2")
    assert "### mrpc-1000: all figures" in (tmp_path / "R.md").read_text()
