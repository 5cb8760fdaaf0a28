"""The report's files: a page that stands alone, what lies beside it, and what is refused before any of it is written."""

from __future__ import annotations

import csv
import html.parser
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

import hiddenkey_rs as hk
from evidence_cases import TEXT, TEXTS, write_study
from hiddenkey_rs.experiments.evidence import paper, records
from hiddenkey_rs.experiments.evidence.comparisons import family
from hiddenkey_rs.experiments.evidence.measures import Measure
from hiddenkey_rs.experiments.evidence.render import Table, markdown
from hiddenkey_rs.experiments.evidence.render import html as as_html
from hiddenkey_rs.experiments.evidence.sections import families, sections
from hiddenkey_rs.experiments.evidence.studies import Study, read_studies
from hiddenkey_rs.experiments.evidence.writing import filled, write_report
from hiddenkey_rs.experiments.sweep.lines import ResultLine, numbered_lines

Change = Callable[[ResultLine], ResultLine | None]


def _study(folder: Path, change: Change) -> Study:
    write_study(folder, {}, change=change)
    return read_studies([folder])[0]


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
    # 5 families of differences, 2 curves x 1 task x 2, 2 tasks x 5 methods of losses
    assert page.counts["img"] == len(list((report / "pictures").iterdir())) == 5 + 4 + 10
    for heading in (
        "Trials",
        "Scores",
        "Stopped early, or trained to the end",
        "mrpc-1000: all figures",
        "As in the paper: Compensation",
        "Cost",
        "Every run",
    ):
        assert f"<h3>{heading}</h3>" in text
    assert text.count("--only") >= 152  # every run's command


def test_the_files_beside_the_page(report: Path, study: Study) -> None:
    rows = list(csv.DictReader((report / "tables" / "runs.csv").open()))
    assert len(rows) == len(study.found) == 152
    assert rows[0]["stage"] == "search"
    assert rows[0]["report_accuracy_chosen"] == ""
    row = next(row for row in rows if row["stage"] == "final")
    assert float(row["report_accuracy_chosen"]) == study.found[row["id"]].line.history[1]["report"]["accuracy"]
    assert row["line"] == study.found[row["id"]].place
    compared = list(csv.DictReader((report / "tables" / "comparisons.csv").open()))
    assert {row["family"] for row in compared} == {"metric", "metric-last", "loss-last", "loss-chosen", "ece"}
    assert float(compared[0]["p"]) == 2 / 2**12
    cells = list(csv.DictReader((report / "tables" / "cells.csv").open()))
    assert len(cells) == 5 * (6 + 5)  # methods x measures; a regression has no calibration
    assert len(list(csv.DictReader((report / "tables" / "epochs.csv").open()))) == 152 * 3
    stopped = list(csv.DictReader((report / "tables" / "early_stopping.csv").open()))
    assert len(stopped) == 2 * 3 * 2  # tasks x methods x (metric, loss)
    assert [stopped[0][name] for name in ("method", "epoch", "baseline", "baseline_epoch", "figure", "pairs")] == [
        "none", "chosen", "none", "last", "accuracy", "12",
    ]  # fmt: skip
    assert float(stopped[0]["low"]) < float(stopped[0]["mean"]) < float(stopped[0]["high"])
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
    with patch.object(records, "write_csv", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        write_report([tmp_path / "results"], tmp_path / "stopped")
    write_report([tmp_path / "results"], tmp_path / "stopped")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(hk.StateError, match="report's folder holds other files"):
        write_report([tmp_path / "results"], tmp_path)
    with pytest.raises(hk.StateError, match="is a file"):
        write_report([tmp_path / "results"], tmp_path / "notes.txt")


def test_parts_of_a_markdown_file_are_written_anew(study: Study, tmp_path: Path) -> None:
    told = [(study.name, sections(study, families(study), None))]
    file = tmp_path / "RESULTS.md"
    prose = "# Results\n\nMine.\n\n<!-- report outcome -->\nstale\n<!-- /report -->\n\nAlso mine.\n"
    file.write_text(prose + "<!-- report synthetic/tests -->\n<!-- /report -->\nEnd.\n")
    for _ in range(2):  # writing twice changes nothing
        text = filled(file, told)
        assert text.startswith("# Results\n\nMine.\n\n<!-- report outcome -->\n\nsynthetic: 'hiddenkey' is better")
        assert "stale" not in text
        assert "\n<!-- /report -->\n\nAlso mine.\n<!-- report synthetic/tests -->\n" in text
        assert text.endswith("<!-- /report -->\nEnd.\n")
        assert text.count("| mrpc-1000 | hiddenkey − none | better | 12 |") == 5
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


def test_parts_of_a_study_test_the_same_and_a_crash_takes_no_result_away(tmp_path: Path) -> None:
    write_study(tmp_path / "a", {})
    lost: Change = lambda line: replace(line, status="failed", error="gone") if line.seed == 100 else None  # noqa: E731
    write_study(tmp_path / "b", {}, change=lost)
    (study,) = read_studies([tmp_path / "a", tmp_path / "b"])
    assert not any(study.missing.values())
    other = TEXT.replace("against: [hiddenkey]", "against: [low-rank]")
    write_study(tmp_path / "c", {}, other)
    with pytest.raises(hk.DataError, match=r"plans with other comparisons \(got '.*c' beside '.*a'\)"):
        read_studies([tmp_path / "a", tmp_path / "c"])
    fewer = TEXT.replace(", 111]", "]")
    (tmp_path / "a" / "plan.yaml").write_text(fewer)  # lines of a seed that the plan has no more
    (study,) = read_studies([tmp_path / "a"])
    assert {item.line.seed for item in study.finals("mrpc-1000", "none")} == set(range(100, 111))
    assert {item.line.seed for item in study.superseded()} == {111}


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
    del history[2]["select"]["accuracy"]
    _lines(tmp_path, _edited(1, history=history))
    with pytest.raises(
        hk.DataError, match=r"got no accuracy of select rows in epoch 3 of 'mrpc-1000/none/0/0/search', .*line 1"
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
        return replace(line, examples={"chosen": {**packed, "correct": ""}, "last": packed}) if strange else line

    study = _study(tmp_path, fewer)
    with pytest.raises(hk.DataError, match=r"reported on different rows \(got \[400, .*0, .*mrpc-1000/none"):
        family(study, lambda task: Measure(task.metric))


def test_torn_lines_are_left_out_wherever_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path, {}, TEXTS)
    _lines(tmp_path, lambda rows: [rows[0], rows[1][:50], *rows[2:]])
    found = numbered_lines(tmp_path / "results.jsonl")
    assert 2 not in found
    assert list(found)[:2] == [1, 3]
    assert "line 2 is torn" in capsys.readouterr().err
    assert "loss" in next(iter(found.values())).history[0]["select"]


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
    table = Table("t", "", "", ("n",), (("hiddenkey sweep p --only 'a|b/0'",),))
    assert "| `hiddenkey sweep p --only 'a\\|b/0'` |" in markdown(table)


def test_pictures_of_like_names_are_pictures_apart(tmp_path: Path) -> None:
    text = TEXT.replace("stsb-500:", "mrpc-1000-low:").replace("task: stsb", "task: mrpc")
    text = text.replace("dropkey-column:", "low-low-rank:").replace("[dropkey-column, hiddenkey]", "[hiddenkey]")
    write_study(tmp_path / "a", {}, text)
    write_report([tmp_path / "a"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    names = [path.name for path in (tmp_path / "out" / "pictures").iterdir()]
    assert "synthetic-loss-mrpc-1000-low-low-rank.png" in names
    assert "synthetic-loss-mrpc-1000-low-low-rank-2.png" in names
    assert len(set(re.findall(r'src="data:image/png;base64,([^"]+)"', page))) == page.count('src="data:image/png')


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
