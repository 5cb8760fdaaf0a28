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
from hiddenkey_rs.experiments.evidence.comparisons import compare, family, losses, outcome
from hiddenkey_rs.experiments.evidence.early_stopping import early_stopping
from hiddenkey_rs.experiments.evidence.measures import Measure, values
from hiddenkey_rs.experiments.evidence.paper_tables import methods_of, paper_tables
from hiddenkey_rs.experiments.evidence.pictures import Pictures
from hiddenkey_rs.experiments.evidence.render import markdown
from hiddenkey_rs.experiments.evidence.runs import cell_commands, costs, curve_points
from hiddenkey_rs.experiments.evidence.search import searched_rates
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
    told = losses(study, family(study, lambda _: Measure("loss", "last")))
    ends = "on 0 of 2 tasks (corrected p < .05 on 0, and higher on 2)."
    assert told.endswith(ends) == (gain < 0)


def test_ties_show_nothing(tmp_path: Path) -> None:
    """The same figures for every method: differences of 0, p = 1, no effect size, no number of seeds."""
    study = study_in(tmp_path, {}, change=_same)
    found = metric_family(study)
    assert {entry.p for entry in found} == {1.0}
    assert {entry.verdict for entry in found} == {"no difference shown"}
    assert all(entry.needed == (None, None) for entry in found)
    assert "is not shown to be better" in outcome(study, found)[0]
    text = markdown(detail(study, "mrpc-1000", found))
    assert "+0.00 [+0.00, +0.00] p 1.000; – seeds" in text


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
    assert any(
        f"hiddenkey sweep {tmp_path}" in str(block) for section in sections(study, [], None) for block in section.blocks
    )


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
    assert any(names[0] in str(block) for section in sections(study, [], None) for block in section.blocks)


def test_a_diverged_run_is_shown_and_leaves_its_pair_out(tmp_path: Path) -> None:
    """It is a result: p may be told. But the seeds that a method survived do not make it the better one."""
    diverged = "mrpc-1000/hiddenkey/1/103/final"
    study = study_in(tmp_path, {"hiddenkey": 0.03}, change=lambda line: failed(line) if line.id == diverged else line)
    found = metric_family(study)
    assert [(len(entry.seeds), entry.settled) for entry in found] == [(11, 12), (11, 12), (12, 12), (12, 12)]
    assert found[0].p == 2 / 2**11
    assert 103 not in found[0].seeds
    assert [(entry.verdict, entry.diverged) for entry in found] == [
        *[("withheld: diverged", (1, 0))] * 2,
        *[("better", (0, 0))] * 2,
    ]
    first, *_, last = outcome(study, found)
    assert first == (
        "synthetic: 'hiddenkey' is better than 'none' on 1 of 2 tasks and 'lora-dropout' on 1 of 2 tasks, than both on 1."
    )
    assert last == (
        "Pairs of which a run diverged are left out: 1 of hiddenkey − none on mrpc-1000, 1 of hiddenkey − lora-dropout on "
        "mrpc-1000. No verdict where the side that is ahead diverged, however small p is: hiddenkey − none on mrpc-1000, "
        "hiddenkey − lora-dropout on mrpc-1000."
    )
    assert f"{diverged} diverged at step 7" in " ".join(row[-1] for row in coverage(study).rows)
    assert not any(study.missing.values()), "nothing is left to run"
    assert {row[:4] for row in coverage(study).rows} >= {("mrpc-1000", "hiddenkey", "2/2", "12/12")}


def test_means_over_fewer_seeds_say_so(study: Study) -> None:
    """Other seeds are other training subsets: beside the means over all of them they would mislead."""
    rows = {row[0]: row[1:] for row in overview(study).rows}
    assert all(cell.endswith(" (3 seeds)") for cell in rows["dropkey-column"])
    assert not any("seeds" in cell for name, cells in rows.items() for cell in cells if name != "dropkey-column")


def test_a_baselines_loss_is_drawn_over_the_methods_own_seeds(study: Study, tmp_path: Path) -> None:
    pictures = Pictures(study, tmp_path, "", {})
    means = [
        pictures._histories("mrpc-1000", "none", like=name)["report"][1]
        for name in (None, "dropkey-column", "hiddenkey")
    ]
    assert means[0] == means[2] != means[1]


@pytest.mark.parametrize(("gain", "verdict"), [(0.05, "better"), (-0.05, "withheld: diverged")])
def test_a_baseline_that_diverged_is_not_ahead_either(gain: float, verdict: str, tmp_path: Path) -> None:
    diverged = "mrpc-1000/none/1/103/final"
    study = study_in(tmp_path, {"hiddenkey": gain}, change=lambda line: failed(line) if line.id == diverged else line)
    assert metric_family(study)[0].verdict == verdict


def test_a_crashed_run_is_not_settled(tmp_path: Path) -> None:
    """The sweep tries it again, so its pair is still to come: no p before that."""
    died = "stsb-500/none/1/104/final"
    study = study_in(tmp_path, {"hiddenkey": 0.03}, change=lambda line: failed(line, None) if line.id == died else line)
    found = metric_family(study)
    assert [(entry.settled, entry.p is None) for entry in found] == [(12, False), (12, False), (11, True), (12, False)]
    assert found[2].verdict == "unfinished"
    assert outcome(study, found)[0].endswith("1 of 4 comparisons lack runs.")
    assert f"{died} failed: out of memory" in " ".join(row[-1] for row in coverage(study).rows)


@pytest.mark.parametrize(("step", "provisional"), [(None, {("stsb-500", "none")}), (7, set())])
def test_a_crashed_search_is_not_finished(step: int | None, provisional: set[tuple[str, str]], tmp_path: Path) -> None:
    def change(line: ResultLine) -> ResultLine:
        return failed(line, step) if line.id == "stsb-500/none/0/0/search" else line

    assert study_in(tmp_path, {}, change=change).provisional == provisional


@pytest.mark.parametrize("method", ["hiddenkey", "plain"])
def test_a_figure_that_lines_lack_is_not_settled(method: str, tmp_path: Path) -> None:
    study = study_in(
        tmp_path, {}, TEXTS, lambda line: line if (line.seed, line.method) == (3, method) else _written(line)
    )
    entry = compare(study, "e2e", "hiddenkey", "plain", Measure("bleu"))
    assert (entry.settled, entry.seeds, entry.p) == (2, (1, 2), None)


def test_early_stopping_is_a_control(study: Study) -> None:
    """Runs over-fit: the chosen epoch is the second of three, .02 better than the last, and hiddenkey adds .03 on every one."""
    table = early_stopping(study)
    assert table is not None
    rows = {row[:2]: row for row in table.rows}
    assert [name for task, name in rows if task == "mrpc-1000"] == [
        "none, chosen − none, last", "hiddenkey, last − none, chosen", "lora-dropout, last − none, chosen",
    ]  # fmt: skip
    runs = {name: [i.line.history for i in study.finals("mrpc-1000", name)] for name in ("none", "hiddenkey")}
    stopped, whole = ([run[n]["report"] for run in runs["none"]] for n in (1, 2))
    trained = [run[2]["report"] for run in runs["hiddenkey"]]
    for name, ours, theirs in (
        ("none, chosen − none, last", stopped, whole), ("hiddenkey, last − none, chosen", trained, stopped),
    ):  # fmt: skip
        row = rows["mrpc-1000", name]
        assert row[2:4] == ("12", "accuracy")
        for cell, figure, form, scale in ((row[4], "accuracy", "+.2f", 100), (row[5], "loss", "+.3f", 1)):
            mean = scale * np.mean([a[figure] - b[figure] for a, b in zip(ours, theirs, strict=True)])
            assert cell.startswith(f"{mean:{form}} [".replace("-", "−"))
    assert rows["mrpc-1000", "none, chosen − none, last"][4].startswith("+")
    named = {section.name: section for section in sections(study, families(study), None)}
    assert named["early-stopping"].blocks[0] == table
    last = {entry.key: entry for entry in families(study)}["metric-last"]
    assert {entry.measure for entry in last.found} == {Measure("accuracy", "last"), Measure("pearson", "last")}
    assert (
        last.found[0].difference == compare(study, "mrpc-1000", "hiddenkey", "none", last.found[0].measure).difference
    )
    shown = markdown(overview(study, "last"))
    assert f"| none | {100 * np.mean([entry['accuracy'] for entry in whole]):.2f} ± " in shown


def test_early_stopping_needs_plain_lora(tmp_path: Path) -> None:
    text = re.sub(
        r"^  (none|low-rank):.*\n", "", TEXT.replace("[none, lora-dropout]", "[lora-dropout]"), flags=re.MULTILINE
    )
    text = text.replace("methods: [none, hiddenkey]", "methods: [hiddenkey]")
    study = study_in(tmp_path, {}, text)
    assert early_stopping(study) is None
    assert "early-stopping" not in {section.name for section in sections(study, families(study), None)}


def test_who_searched_learning_rates_is_said(study: Study, tmp_path: Path) -> None:
    said = "Only 'none', 'low-rank' searched their learning rates: the other methods ran at the plan's"
    assert searched_rates(study).startswith(said)
    named = {section.name: section for section in sections(study, families(study), None)}
    assert any(said in str(block) for block in named["run"].blocks)
    assert any(said in sentence for sentence in outcomes(study, families(study)))
    everybody = TEXTS.replace("[{rate: 0.05}, {rate: 0.1}]", "[{rate: 0.05}, {rate: 0.1, lr_scale: 2.0}]")
    assert searched_rates(study_in(tmp_path / "all", {}, everybody)) == ""
    nobody = TEXTS.replace("[{lr: 1.0e-3}, {lr: 2.0e-3}]", "[{rank: 4}, {rank: 8}]")
    assert searched_rates(study_in(tmp_path / "none", {}, nobody)) == ""
    assert "'plain' searched its learning rate" in searched_rates(study_in(tmp_path / "one", {}, TEXTS))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEXTS, "on at most 500 selection rows (one half of the development rows)"),
        (
            TEXTS.replace("dev,", "dev, select_rows: 100000,"),
            "on all selection rows (one half of the development rows)",
        ),
        (TEXT, "on 20 selection rows (training rows that no subset contains)"),
    ],
)
def test_selection_rows_are_said_as_they_can_be_known(text: str, said: str, tmp_path: Path) -> None:
    study = study_in(tmp_path, {}, text)
    named = {section.name: section for section in sections(study, [], None)}
    assert any(said in str(block) for block in named["run"].blocks)


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
    assert row[:3] == ("none", "lr 0.001 (highest)", "12")
    losses = [item.line.history[-1] for item in study.finals("mrpc-1000", "none")]
    assert row[4].startswith(f"{100 * np.mean([e['report']['accuracy'] for e in losses]):.2f} ± ")
    assert row[6].startswith(f"{np.mean([e['report']['loss'] for e in losses]):.3f} ± ")
    assert row[7].startswith(f"{np.mean([e['report']['loss'] - e['train']['loss'] for e in losses]):.3f} ± ")
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
    study = study_in(tmp_path / "with", {}, TEXTS, _written)
    (table,) = paper_tables(study)
    assert table.columns == ("method", "bleu, ours", "bleu, paper", "ter")
    assert [row[1:] for row in table.rows] == [
        ("62.00 (1.00)", "68.5", "40.00 (0.00)"),
        ("62.00 (1.00)", "69.76", "40.00 (0.00)"),
    ]
    assert "gpt2-tiny, mean" in table.caption
    assert "for 200 of 630 sources of the test split. The paper's: GPT2-Medium" in table.caption
    assert "on the whole test split" in table.caption
    assert metric_family(study)[0].measure.lower_is_better
    bleu = next(entry for entry in families(study) if entry.key == "bleu")
    assert [(e.method, e.baseline, e.measure, e.seeds) for e in bleu.found] == [
        ("hiddenkey", "plain", Measure("bleu"), (1, 2, 3))
    ]
    assert bleu.found[0].p == 1.0  # all differences are 0
    without = study_in(tmp_path / "without", {}, TEXTS)
    assert paper_tables(without) == []
    assert "bleu" not in {entry.key for entry in families(without)}


def _written(line: ResultLine) -> ResultLine:
    """A final run with the scores of texts."""
    if line.stage == "search":
        return line
    history = [{**e, "report": {**e["report"], "bleu": 60.0 + line.seed, "ter": 40.0}} for e in line.history]
    return dataclasses.replace(line, history=history, texts={"groups": 200, "of": 630, "split": "test"})


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"groups": 630, "of": 630, "split": "test"}, "for 630 sources of the test split."),
        ({"groups": 200}, "for 200 sources."),
        ({}, "for an unrecorded number of sources."),
    ],
)
def test_old_lines_say_less_of_their_texts(texts: dict[str, object], said: str, tmp_path: Path) -> None:
    study = study_in(tmp_path, {}, TEXTS, lambda line: dataclasses.replace(_written(line), texts=texts))
    assert said in paper_tables(study)[0].caption


def test_a_family_may_be_about_the_texts(tmp_path: Path) -> None:
    text = TEXTS.replace("against: [hiddenkey]}", "against: [hiddenkey], measure: bleu}")
    study = study_in(tmp_path / "with", {}, text, _written)
    first = families(study)[0]
    assert (first.key, first.caption) == ("bleu", "The family that the plan fixed beforehand.")
    assert outcome(study, first.found)[1].startswith("Measured by bleu at the chosen epoch")
    assert "Differences are of bleu" in detail(study, "e2e", first.found).caption
    without = study_in(tmp_path / "without", {}, text)
    assert "1 of 1 comparisons lack runs" in outcome(without, families(without)[0].found)[0]


def test_texts_that_are_missing_are_said(tmp_path: Path) -> None:
    texts = {"groups": 200, "split": "test", "empty": 2, "absent": {"cider": "there is no pycocoevalcap"}}
    study = study_in(tmp_path, {}, TEXTS, lambda line: dataclasses.replace(_written(line), texts=texts))
    said = paper_tables(study)[0].caption
    assert said.endswith("12 texts are empty. cider is absent (there is no pycocoevalcap).")


def test_a_llama_stands_beside_the_papers_llama(tmp_path: Path) -> None:
    study = study_in(tmp_path, {}, TEXTS.replace("gpt2-tiny", "runs/small-llama"), _written)
    (table,) = paper_tables(study)
    assert [row[2] for row in table.rows] == ["66.71", "69.02"]
    assert "LLaMA2-7B" in table.caption
    assert "GPT2" not in table.caption


def test_the_papers_tables_are_those_the_plan_has_something_of(tmp_path: Path) -> None:
    """hiddenkey-minus stands in two of them, and alone asks for none; a task the paper lacks gets no empty column."""
    text = TEXT.replace("dropkey-column", "hiddenkey-minus").replace("task: mrpc", "task: webnlg-category")
    (table,) = paper_tables(study_in(tmp_path, {}, text))
    assert table.key == "paper-compensation"
    assert table.columns == ("method", "mrpc-1000, ours", "stsb-500, ours", "stsb, paper")


def test_what_peak_memory_is_of_is_said(study: Study, tmp_path: Path) -> None:
    assert "Peak memory is that of the process, which runs several trials" in costs(study).caption
    change: Change = lambda line: dataclasses.replace(line, peak_of="device")  # noqa: E731
    assert (
        "Peak memory is what torch had allocated on the GPU in training. Runs"
        in costs(study_in(tmp_path, {}, TEXTS, change)).caption
    )
