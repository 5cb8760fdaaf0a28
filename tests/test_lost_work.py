"""Work that must not be lost or mixed: resumed runs of other data, two runs in one folder, files that would be replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import families
import hiddenkey_rs as hk
from hiddenkey_rs.cli.main import main
from hiddenkey_rs.experiments import folder
from hiddenkey_rs.experiments.data import read_rows
from hiddenkey_rs.experiments.run_config import RunConfig
from hiddenkey_rs.experiments.sweep.reading import load_plan

ROWS = [{"input_ids": [5, n + 6, 7], "labels": n % 2} for n in range(32)]


def trainer(out: Path, data: Any = ROWS, **changed: Any) -> hk.HiddenKeyTrainer:
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(str(out), **settings | changed)
    return hk.HiddenKeyTrainer(
        model=families.build("bert"),
        args=arguments,
        train_dataset=data,
        config="hiddencut-element",
        stock_dropout="off",
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
    rows = read_rows(file)
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
