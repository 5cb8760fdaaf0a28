"""What a search chose: seeds that change, margins, edges and learning rates; and the measure that a family is about."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import hiddenkey_rs as hk
from evidence_cases import TEXT, failed, write_study
from hiddenkey_rs.experiments.evidence.comparisons import outcome
from hiddenkey_rs.experiments.evidence.search import chosen_text, search_table, unequal_rates
from hiddenkey_rs.experiments.evidence.sections import families, outcomes, sections
from hiddenkey_rs.experiments.evidence.studies import Study, read_studies
from hiddenkey_rs.experiments.evidence.tables import detail
from hiddenkey_rs.experiments.sweep.lines import ResultLine, append_line, pack_examples, per_example, read_lines
from hiddenkey_rs.experiments.sweep.plan import SEARCH
from hiddenkey_rs.experiments.sweep.reading import load_plan
from hiddenkey_rs.experiments.sweep.runner import PLAN, RESULTS, Sweep
from hiddenkey_rs.experiments.sweep.selection import search_scores, winners

LINE = ResultLine(
    id="a", plan="p", stage=SEARCH, task="t", method="m", seed=0, status="failed", error="x", setting={"rate": 0.1}
)


def study_in(folder: Path, text: str = TEXT, **options) -> Study:
    write_study(folder, {"hiddenkey": 0.03}, text, **options)
    return read_studies([folder])[0]


@pytest.mark.parametrize("seeds", ["[0]", "[0, 2]", "[7]"])
def test_search_seeds_that_change_take_their_runs_along(seeds: str, tmp_path: Path) -> None:
    """Runs of seeds that the plan no longer has decide nothing, and a seed that is new is searched."""
    text = TEXT.replace("search_seeds: [0]", "search_seeds: [0, 1]")
    write_study(tmp_path, {}, text, change=lambda line: line if line.stage == SEARCH else None)
    changed = text.replace("search_seeds: [0, 1]", f"search_seeds: {seeds}")
    (tmp_path / "plan.digest").write_text(load_plan(tmp_path / PLAN, "data").digest)
    (tmp_path / PLAN).write_text(changed)
    plan = load_plan(tmp_path / PLAN, "data")
    sweep = Sweep(plan, changed, tmp_path)
    (study,) = read_studies([tmp_path])
    kept = seeds == "[0]"
    assert len(sweep.winners()) == len(study.settings) == (10 if kept else 0)
    stages = {trial.stage for trial in sweep.waiting()}
    assert stages == ({"final", "grid"} if kept else {SEARCH})


def test_scores_are_means_over_seeds_best_first(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    scores = search_scores(study.plan, study.searched())
    for (task, method), found in scores.items():
        assert list(found) == [1, 0] == sorted(found, key=found.__getitem__, reverse=True), (task, method)
    assert winners(study.plan, study.searched()) == study.settings
    table = search_table(study)
    assert table is not None
    row = next(row for row in table.rows if row[:2] == ("mrpc-1000", "hiddenkey"))
    assert row[2] == "rate 0.1"
    best, other = scores["mrpc-1000", "hiddenkey"].values()
    assert row[3:] == (f"{100 * best:.2f}", f"rate 0.05: {100 * other:.2f}", f"{100 * (best - other):.2f}")
    assert "search" in {section.name for section in sections(study, families(study), None)}


def test_the_edge_of_what_was_offered_is_said(tmp_path: Path) -> None:
    wide = TEXT.replace("[{rate: 0.05}, {rate: 0.1}]", "[{rate: 0.05}, {rate: 0.1}, {rate: 0.2}]")
    wide = re.sub(r"settings: \[(\{l\S+ [^}]*\}), (\{[^}]*\})\]", r"settings: [\1, \2, {rank: 3}]", wide)
    study = study_in(tmp_path, wide)
    assert chosen_text(study, "mrpc-1000", "hiddenkey") == "rate 0.1"
    assert chosen_text(study, "mrpc-1000", "none") == "lr 0.001 (highest)"
    assert chosen_text(dataclasses.replace(study, settings={}), "mrpc-1000", "none") == "–"


def test_learning_rates_that_differ_are_said(tmp_path: Path) -> None:
    text = TEXT.replace("{rate: 0.1}]", "{rate: 0.1, lr_scale: 4.0}]").replace("epochs: 3", "epochs: 3, lr: 1.0e-3")
    study = study_in(tmp_path, text)
    said = unequal_rates(study)
    assert "on mrpc-1000 'hiddenkey' at 0.004, 'none' at 0.001, 'lora-dropout' at 0.001; on stsb-500" in said
    assert said in outcomes(study, families(study))
    assert unequal_rates(study_in(tmp_path / "same", TEXT.replace("epochs: 3", "epochs: 3, lr: 1.0e-3"))) == ""


def test_a_family_may_be_about_the_loss(tmp_path: Path) -> None:
    about = TEXT.replace("against: [hiddenkey]}", "against: [hiddenkey], measure: loss}")
    study = study_in(tmp_path, about)
    first, *others = families(study)
    assert (first.key, first.caption) == ("loss-chosen", "The family that the plan fixed beforehand.")
    assert [entry.key for entry in others[:2]] == ["metric", "metric-last"]
    assert all(entry.caption.endswith("and corrected by itself.") for entry in others)
    assert outcome(study, first.found)[1].startswith("Measured by loss at the chosen epoch")
    assert outcomes(study, families(study))[0] == outcome(study, first.found)[0]
    table = detail(study, "mrpc-1000", first.found)
    assert "Differences are of loss at the chosen epoch" in table.caption
    assert "p 0.002; " in next(row for row in table.rows if row[0] == "hiddenkey")[-1]
    plain = load_plan(_written(tmp_path / "plain.yaml", TEXT), "data")
    assert (plain.measure, study.plan.measure, plain.digest) == ("metric", "loss", study.plan.digest)
    (tmp_path / "plan.digest").write_text(plain.digest)
    with pytest.raises(hk.StateError, match=r"a plan keeps its measure \(got new: metric and missing: loss"):
        Sweep(plain, TEXT, tmp_path)
    bad = _written(tmp_path / "bad.yaml", about.replace("measure: loss", "measure: ece"))
    with pytest.raises(hk.ConfigError, match=r"unknown measure 'ece' \(got .*line 13\); use metric"):
        load_plan(bad, "data")
    bad = _written(tmp_path / "worse.yaml", about.replace("measure: loss", "measure: bleu"))
    with pytest.raises(hk.ConfigError, match="the measure bleu is of texts, and this plan generates none"):
        load_plan(bad, "data")


def test_a_method_that_always_diverges_lacks_no_runs(tmp_path: Path) -> None:
    study = study_in(
        tmp_path,
        change=lambda line: failed(line) if line.method == "hiddenkey" and line.stage == "final" else line,
    )
    found = families(study)[0].found
    assert {entry.verdict for entry in found} == {"diverged"}
    said = " ".join(outcome(study, found))
    assert "lack runs" not in said
    assert "12 of hiddenkey − none on mrpc-1000" in said


def test_losses_beyond_float16_are_its_largest() -> None:
    packed = pack_examples(None, np.array([1.0, 1e6, np.inf, -np.inf]))
    line = dataclasses.replace(LINE, examples={"last": packed})
    assert per_example(line, "last")[1].tolist() == [1.0, 65504.0, 65504.0, -65504.0]


@pytest.mark.parametrize("cut", [1, 3, 5, 40, -1])
def test_a_line_that_was_cut_anywhere_is_torn(cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / RESULTS
    for name in ("a", "b"):
        append_line(file, dataclasses.replace(LINE, id=name))
    first, second, _ = file.read_text().split("\n")
    file.write_text(f"{first[:cut]}\n{second}\n")
    assert [line.id for line in read_lines(file)] == ["b"]
    assert "line 1 is torn" in capsys.readouterr().err


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file
