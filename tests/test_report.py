"""The report: what it claims follows from its lines, what is missing is said, and what does not belong is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hiddenkey_rs as hk
from evidence_cases import SEEDS, TEXT, TEXTS, failed, write_study
from hiddenkey_rs.experiments.evidence import paper
from hiddenkey_rs.experiments.evidence.comparisons import compare, family, outcome
from hiddenkey_rs.experiments.evidence.measures import Measure, values
from hiddenkey_rs.experiments.evidence.paper_tables import methods_of, paper_tables
from hiddenkey_rs.experiments.evidence.render import markdown
from hiddenkey_rs.experiments.evidence.runs import cell_commands, costs, curve_points
from hiddenkey_rs.experiments.evidence.sections import families, outcomes, sections
from hiddenkey_rs.experiments.evidence.studies import Study, read_studies
from hiddenkey_rs.experiments.evidence.tables import coverage, detail, overview
from hiddenkey_rs.experiments.evidence.writing import write_report
from hiddenkey_rs.experiments.statistics import sign_flip
from hiddenkey_rs.experiments.sweep.lines import ResultLine, pack_examples
from hiddenkey_rs.experiments.sweep.reading import load_plan

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
    assert outcome(study, found)[-1] == (
        "Pairs of which a run failed are left out: 1 of hiddenkey − none on mrpc-1000, 1 of hiddenkey − lora-dropout on "
        "mrpc-1000, 1 of hiddenkey − none on stsb-500."
    )
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


def test_the_papers_methods_are_found_by_what_they_drop(study: Study, tmp_path: Path) -> None:
    # low-rank and lora-dropout drop nothing of ours either: they are controls, and not the paper's first row
    assert methods_of(study.plan) == {
        "none": "none", "dropkey-column": "dropkey-column", "hiddenkey": "hiddenkey",
    }  # fmt: skip
    # nor are they if they come first
    first = re.sub(r"^  none:.*\n", "", TEXT, flags=re.MULTILINE)
    none = next(line for line in TEXT.splitlines() if line.startswith("  none:"))
    (tmp_path / "plan.yaml").write_text(first.replace("comparisons:", f"{none}\ncomparisons:"))
    assert methods_of(load_plan(tmp_path / "plan.yaml", "data"))["none"] == "none"
    single, compensation = paper_tables(study)
    assert single.columns == ("method", "mrpc-1000, ours", "mrpc, paper", "stsb-500, ours", "stsb, paper")
    assert [row[0] for row in single.rows] == ["none", "dropkey-column"]
    assert single.rows[1][2] == "90.93 (0.40)"
    assert compensation.rows[1][4] == "92.30 (0.11)"


def test_generated_texts_stand_beside_the_papers(tmp_path: Path) -> None:
    def texts(line: ResultLine) -> ResultLine:
        if line.stage == "search":
            return line
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
