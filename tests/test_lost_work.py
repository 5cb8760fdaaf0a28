"""Work that must not be lost or mixed: resumed runs of other data, two runs in one folder, files that would be replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

import families
import hiddenkey_rs as hk
from hiddenkey_rs.cli.main import main
from hiddenkey_rs.experiments import folder
from hiddenkey_rs.experiments.data import file_splits, read_rows
from hiddenkey_rs.experiments.run_config import RunConfig
from hiddenkey_rs.experiments.sweep.reading import load_plan
from hiddenkey_rs.experiments.tasks import own_task
from hiddenkey_rs.loading.arrow import load_hub

ROWS = [{"input_ids": [5, n + 6, 7], "labels": n % 2} for n in range(32)]


def trainer(out: Path, data: Any = ROWS, loader: str = "auto", **changed: Any) -> hk.HiddenKeyTrainer:
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(str(out), **settings | changed)
    return hk.HiddenKeyTrainer(
        model=families.build("bert"),
        args=arguments,
        train_dataset=data,
        config="hiddencut-element",
        stock_dropout="off",
        loader=loader,
    )


@pytest.mark.parametrize(
    ("data", "changed", "what"),
    [
        ([{**row, "labels": 1 - row["labels"]} for row in ROWS], {}, "another data "),
        (ROWS[:20], {}, "another data set's size .*got 32 there and 20 here"),
        (ROWS, {"per_device_train_batch_size": 8}, "number of rows a step .*got 4 there and 8 here"),
        (ROWS, {"gradient_accumulation_steps": 2}, "number of rows a step .*got 4 there and 8 here"),
        (ROWS, {"seed": 7}, "order's seed .*got 42 there and 7 here"),
    ],
)
def test_resuming_goes_over_what_was_begun(data: Any, changed: dict[str, Any], what: str, tmp_path: Path) -> None:
    trainer(tmp_path).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(hk.StateError, match=what):
        trainer(tmp_path, data, **changed).train(resume_from_checkpoint=checkpoint)
    same = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer(tmp_path, **same).train(resume_from_checkpoint=checkpoint)


def test_our_loader_goes_over_what_was_begun_too(tmp_path: Path) -> None:
    """Its own state knows of a list no more than how many examples it has."""
    trainer(tmp_path, loader="hiddenkey").train()
    other = [{**row, "labels": 1 - row["labels"]} for row in ROWS]
    with pytest.raises(hk.StateError, match="trained with another data "):
        trainer(tmp_path, other, loader="hiddenkey").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wider = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer(tmp_path, loader="hiddenkey", **wider).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_rows_grouped_by_length_have_a_place_at_an_epochs_end_alone(tmp_path: Path) -> None:
    grouped = {"train_sampling_strategy": "group_by_length", "max_steps": 20, "save_steps": 2, "save_total_limit": 20}
    rows = [{"input_ids": [5 + n] * (3 + n % 7), "labels": n % 2} for n in range(32)]
    grouped |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    whole = trainer(tmp_path, rows, **grouped)
    whole.train()
    for step in (2, 8, 16):
        again = trainer(tmp_path, rows, **grouped)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for (name, found), wanted in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
            assert found.equal(wanted), (step, name)
    with pytest.raises(
        hk.StateError, match=r"grouped by length \(got .*checkpoint-10' in the middle of epoch 2\); resume"
    ):
        trainer(tmp_path, rows, **grouped).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    with pytest.raises(
        hk.StateError, match=r"another train_sampling_strategy .*got group_by_length there and random here"
    ):
        trainer(tmp_path, rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(
        hk.ConfigError, match=r"lengths that it is told \(got .*32 rows without\); give a column 'length'"
    ):
        trainer(tmp_path, loader="hiddenkey", **grouped)


def test_a_run_that_is_resumed_at_its_end_does_no_step_more(tmp_path: Path) -> None:
    for loader in ("stock", "hiddenkey"):
        out = tmp_path / loader
        whole = trainer(out, loader=loader, max_steps=6, lr_scheduler_type="constant")
        whole.train()
        again = trainer(out, loader=loader, max_steps=6, lr_scheduler_type="constant")
        again.train(resume_from_checkpoint=str(out / "checkpoint-6"))
        assert again.state.global_step == 6
        for (name, found), wanted in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
            assert found.equal(wanted), name


def test_a_run_killed_behind_its_last_step_ends_as_it_would_have(tmp_path: Path) -> None:
    out, flags = tmp_path / "run", ["--model", "gpt2-tiny", "--task", "demo", "--max-steps", "3", "--save-steps", "3"]
    flags = ["train", *flags, "--schedule", "constant", "--batch-size", "4", "--log-every", "1", "--log-masks", "2"]
    assert main([*flags, "--out", str(out)]) == 0
    figures = json.loads((out / folder.METRICS).read_text())
    log, masks = (out / folder.LOG).read_text(), (out / folder.MASKS).read_text()
    assert {json.loads(line)["step"] for line in masks.splitlines()} == {0, 1}
    (out / folder.METRICS).unlink()
    (out / ".adapter.new").mkdir()
    (out / folder.ADAPTER).rename(out / ".adapter.old")  # between the two renames
    (out / ".adapter.old" / "marker").touch()
    for file in (out / ".adapter.old").iterdir():
        (out / ".adapter.new" / file.name).write_bytes(file.read_bytes())
    assert main(["eval", "--run", str(out)]) == 0
    assert main([*flags, "--out", str(out), "--resume"]) == 0
    again = json.loads((out / folder.METRICS).read_text())
    assert (again["dev"], again["last"]) == (figures["dev"], figures["last"])
    assert [json.loads(line)["step"] for line in (out / folder.LOG).read_text().splitlines()] == [
        json.loads(line)["step"] for line in log.splitlines()
    ]
    assert (out / folder.MASKS).read_text() == masks


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"preset": "none", "heads": "query"}, "no AttentionDrop to change .*got heads='query'.*its rate or pattern"),
        ({"preset": "dropkey-column", "rescale": False}, "no HiddenDrop to change .*got rescale=False"),
        ({"preset": "hiddenkey-minus", "consistency_weight": 2.0}, "no Consistency to change .*got weight=2.0"),
        ({"dev_file": "mine.jsonl"}, "dev_file is of train_file .*beside task='demo'.*would be ignored"),
        ({"label_field": "gold"}, "label_field is of train_file or dataset .*beside task='demo'"),
        ({"task": None, "dataset": "x", "test_file": "mine"}, "test_file is of train_file .*beside dataset='x'"),
        ({"task": "stsb", "data": "d", "label_smoothing": 0.1}, "labels that are numbers cannot be smoothed"),
        ({"train_eval_rows": -5}, "train_eval_rows must be at least 0 .*got -5.*--train-eval-rows"),
        ({"log_masks": -1}, "log_masks must be at least 0"),
    ],
)
def test_choices_that_would_do_nothing_or_something_else_are_refused(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(hk.ConfigError, match=said):
        RunConfig(**{"task": "demo", **choices}).check()
    changed = RunConfig(task="demo", preset="none", attention_rate=0.2, heads="query").drops()
    assert changed.attention == hk.AttentionDrop(rate=0.2, heads="query")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["eval", "--run", "r", "--beams", "4"], "--beams is about generated texts"),
        (["tokenize", "--file", "f.csv", "--split", "dev"], "--split is of --task or --dataset .*beside --file"),
        (["tokenize", "--task", "demo", "--dataset-config", "c"], "--dataset-config is of --dataset "),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    command: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--model", "gpt2-tiny", "--out", str(tmp_path / "o.arrow")] if command[0] == "tokenize" else []
    assert main([*command, *rest]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_data_that_cannot_be_read_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": ')
    with pytest.raises(hk.DataError, match=r"the data set cannot be loaded \(got '.*hub'"):
        load_hub(str(tmp_path / "hub"))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": [0, 1]}\n' * 20)
    task = own_task("own", ("text",), "classification", "label", 0)
    with pytest.raises(hk.DataError, match=r"neither word nor number \(got \[0, 1\] in .*line 1\); see --label-field"):
        file_splits(task, str(file), None, None, seed=0)


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    with (
        folder.locked(tmp_path),
        pytest.raises(hk.StateError, match="another run is at work in the folder"),
        folder.locked(tmp_path),
    ):
        pass
    with folder.locked(tmp_path):
        folder.check_free(tmp_path)  # a lock is no run
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_of_the_log_is_of_a_step_that_runs_again(tmp_path: Path) -> None:
    log = tmp_path / folder.LOG
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')
    folder.keep_lines_to(log, 2, evaluated=False)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_demo_replaces_demos_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "lora"
    mine.mkdir()
    (mine / folder.CONFIG).write_text(json.dumps({"run": {"task": "mrpc"}}))
    (mine / "notes.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path), "--epochs", "1"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert (mine / "notes.txt").read_text() == "mine"


def test_a_store_does_not_replace_its_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.arrow"
    file.write_bytes(b"texts")
    assert main(["tokenize", "--model", "gpt2-tiny", "--file", str(file), "--out", str(file)]) == 2
    assert "would replace the texts" in capsys.readouterr().err
    assert file.read_bytes() == b"texts"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('label,text\n1,"an open quote\n0,more\n', "cannot be read .*unexpected end of data"),
        ("text,label,label\na,0,1\n", "a column stands twice .*'label'"),
    ],
)
def test_csv_that_says_two_things_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(hk.DataError, match=said):
        read_rows(file)


def test_csv_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("\ufefflabel,text\n1,a\n007,²\n-3,--5\n")
    rows = read_rows(file, "label")
    assert [(row["label"], row["text"]) for row in rows] == [(1, "a"), ("007", "²"), (-3, "--5")]


def test_a_config_file_brings_its_rates_and_leaves_the_seed(tmp_path: Path) -> None:
    file = tmp_path / "hk.yaml"
    file.write_text(hk.HiddenKeyConfig().to_yaml())
    with pytest.raises(hk.ConfigError, match=r"a config file brings its rates \(got rate=0.4 beside"):
        RunConfig(task="demo", hiddenkey=str(file), rate=0.4)
    assert RunConfig(task="demo", hiddenkey=str(file), seed=7).drops().seed == 7
    file.write_text(hk.HiddenKeyConfig(seed=3).to_yaml())
    assert RunConfig(task="demo", hiddenkey=str(file), seed=7).drops().seed == 3


def test_a_method_without_settings_has_one(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    text = "tasks: {small: {task: demo}}\nmethods:\n  none: {preset: none}\n  hiddenkey: {preset: hiddenkey, settings: [{}]}\n"
    file.write_text(text)
    assert [len(method.settings) for method in load_plan(file).methods.values()] == [1, 1]


def test_short_runs_are_logged_and_their_divergence_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} words", "label": n % 2}) + "\n" for n in range(24)))
    base = [
        "train",
        "--model",
        "gpt2-tiny",
        "--train-file",
        str(file),
        "--text-fields",
        "text",
        "--epochs",
        "2",
        "--batch-size",
        "4",
    ]
    assert main([*base, "--out", str(tmp_path / "short")]) == 0
    metrics = json.loads((tmp_path / "short" / folder.METRICS).read_text())
    assert metrics["realised_rates"]
    assert main([*base, "--lr", "1e38", "--out", str(tmp_path / "far")]) == 1
    assert "training diverged" in capsys.readouterr().err
    assert not (tmp_path / "far" / folder.ADAPTER).exists()
