"""One trial of a sweep: its figures, its texts, and what they are of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import families
from hiddenkey_rs import DataError
from hiddenkey_rs.experiments import generation, models
from hiddenkey_rs.experiments.features import collator, tokenise
from hiddenkey_rs.experiments.generation import Decoding
from hiddenkey_rs.experiments.memory import PeakMemory
from hiddenkey_rs.experiments.outcomes import outcomes
from hiddenkey_rs.experiments.sweep import texts
from hiddenkey_rs.experiments.sweep import trial as trials
from hiddenkey_rs.experiments.sweep.plan import Plan
from hiddenkey_rs.experiments.sweep.reading import load_plan
from hiddenkey_rs.experiments.sweep.trial import run_trial
from hiddenkey_rs.experiments.sweep.watching import Watcher
from hiddenkey_rs.experiments.tasks import TASKS
from test_sweep_runner import PLAN


def texts_plan(tmp_path: Path) -> Plan:
    """Of one method on a little E2E."""
    (tmp_path / "data" / "E2E").mkdir(parents=True)
    for split, count in (("train", 12), ("dev", 8)):
        rows = [{"source": f"name : {split} {n // 2}", "target": f"{split} {n // 2} is a place"} for n in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / "E2E" / f"{split}.jsonl").write_text(text)
    (tmp_path / "plan.yaml").write_text(
        "protocol: {select_from: dev, select_rows: 100, select_by: loss, generate: 1, search_seeds: [0], final_seeds: [1]}\n"
        "base: {model: gpt2-tiny, epochs: 2, batch_size: 4, lr: 1.0e-3}\n"
        "tasks: {e2e: {task: e2e, train_size: 8}}\n"
        "methods: {none: {preset: none, settings: [{}]}}\n"
    )
    return load_plan(tmp_path / "plan.yaml", str(tmp_path / "data"))


def test_a_text_trial_of_an_encoder_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder's inputs are made of the labels, which a look at held-back rows must therefore hand over."""
    monkeypatch.setitem(generation._TASKS, "e2e", (Decoding(beams=2, max_new_tokens=8), ("bleu",)))
    model, tokenizer = families.build("bart", vocab_size=300, max_position_embeddings=64), models.byte_tokenizer()
    monkeypatch.setattr(trials, "load_model", lambda *_: (model, tokenizer))
    plan = texts_plan(tmp_path)
    assert run_trial(plan.final({("e2e", "none"): 0})[0], plan.digest, "").done
    rows = [{"source": f"name : {'a' * n}", "target": "b" * n} for n in (3, 9, 5)]
    examples = tokenise(rows, TASKS["e2e"], tokenizer, 64, encoder_decoder=True)
    collate = collator(tokenizer, "lm")
    found = outcomes(model, examples, TASKS["e2e"], collate, batch_size=2).figures(TASKS["e2e"])
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(model.eval()(**collate(examples)).loss), rel=1e-5)


def test_a_data_to_text_trial_leaves_scored_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Final runs generate with the best epoch's weights, for whole sources that nothing was chosen on."""
    monkeypatch.setitem(generation._TASKS, "e2e", (Decoding(beams=2, max_new_tokens=8), ("bleu", "rouge_l", "cider")))
    plan = texts_plan(tmp_path)
    searched = run_trial(plan.search()[0], plan.digest, "")
    assert not searched.texts
    final = run_trial(plan.final({("e2e", "none"): 0})[0], plan.digest, "")
    assert final.texts["groups"] == 1
    assert (final.texts["split"], final.texts["of"]) == ("dev", 2)
    assert final.texts["decoding"]["beams"] == 2
    other = final.history[1 - final.chosen]["report"]
    chosen = final.history[final.chosen]["report"]
    assert chosen["rouge_l"] >= 0
    assert set(chosen) - set(other) == {"bleu", "rouge_l", "cider"} - set(final.texts["absent"])
    assert "CIDEr" in final.texts["absent"]["cider"] or "pycocoevalcap" in final.texts["absent"]["cider"]
    assert len(final.texts["hypotheses"]) == 1
    refuse = DataError("all texts are empty (got 1 of them); the model generates nothing")
    monkeypatch.setattr(texts, "generate_and_score", lambda *_: (_ for _ in ()).throw(refuse))
    kept = run_trial(plan.final({("e2e", "none"): 0})[0], plan.digest, "")
    assert kept.status == "done", "its training is not lost"
    assert kept.texts["absent"] == {"texts": str(refuse)}
    assert kept.history[kept.chosen]["report"] == {name: final.history[kept.chosen]["report"][name] for name in other}


def test_a_trial_says_how_fast_and_with_how_much_memory_it_trained(tmp_path: Path) -> None:
    text = PLAN.replace("epochs: 1", "epochs: 2, batch_size: 8, accumulation: 3")
    (tmp_path / "plan.yaml").write_text(text)
    found = run_trial(load_plan(tmp_path / "plan.yaml").search()[0], "x", "command")
    assert found.history[-1]["step"] == 4  # thirty rows are four batches, and those two steps
    assert found.examples_per_second is not None
    assert found.seconds_per_step is not None
    assert found.examples_per_second * found.seconds_per_step * 4 == pytest.approx(60, rel=0.01)
    here = PeakMemory()
    here.begin()
    assert found.peak_of == here.of  # begun anew, where the system can: the process has run other trials
    assert found.peak_rss_mb is not None
    assert found.peak_rss_mb > 1


def test_a_trial_recomputes_activations_if_asked_to(tmp_path: Path) -> None:
    for asked in ("true", "false"):
        text = PLAN.replace("epochs: 1", f"epochs: 1, activation_checkpointing: {asked}")
        (tmp_path / "plan.yaml").write_text(text)
        trial = load_plan(tmp_path / "plan.yaml").search()[0]
        prepared = trials._prepare(trial, TASKS["demo"])
        watcher = Watcher(trial, TASKS["demo"], prepared.model, prepared.parts, prepared.collate)
        trials._trainer(trial.config, prepared, watcher).handle.detach()
        assert prepared.model.is_gradient_checkpointing is (asked == "true")


def test_texts_are_generated_for_drawn_sources(tmp_path: Path) -> None:
    (tmp_path / "E2E").mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"source": f"{split} : {n // 2}", "target": f"a place {n}"} for n in range(80)]
        (tmp_path / "E2E" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = PLAN.replace("task: demo", "task: e2e").replace("select_rows", "select_from: dev, generate: 9, select_rows")
    (tmp_path / "plan.yaml").write_text(text)
    plan = load_plan(tmp_path / "plan.yaml", str(tmp_path))
    first, second = (
        trials._prepare(trial, TASKS["e2e"])
        for trial in plan.final({("small", "none"): 0})  # of two seeds
    )
    sources = [group.source for group in first.groups]
    assert sources == [group.source for group in second.groups]
    assert len(set(sources)) == 9
    assert sources != [f"test : {n}" for n in range(9)]
    assert all(len(group.refs) == 2 for group in first.groups)
    assert first.drawn == {"split": "test", "of": 40}


def test_a_trial_never_divides_the_texts_of_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "WebNLG").mkdir()
    for split in ("train", "dev"):
        rows = [{"source": f"{n // 2}", "target": f"{split} {n}", "category": "Food"} for n in range(40)]
        (tmp_path / "WebNLG" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = PLAN.replace("task: demo", "task: webnlg-category").replace("select_rows", "select_from: dev, select_rows")
    (tmp_path / "plan.yaml").write_text(text)
    trial = load_plan(tmp_path / "plan.yaml", str(tmp_path)).final({("small", "none"): 0})[0]
    monkeypatch.setattr(trials, "tokenise", lambda rows, *_: rows)
    parts = trials._prepare(trial, TASKS["webnlg-category"]).parts
    sides = [{row["source"] for row in parts[name]} for name in ("select", "report")]
    assert all(sides)
    assert not sides[0] & sides[1]
