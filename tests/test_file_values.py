"""What files say: numbers as YAML 1.2 writes them, values of the wrong kind, files that are damaged or cannot be written."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import hiddenkey_rs as hk
from hiddenkey_rs.cli.main import main
from hiddenkey_rs.cli.train import run_config
from hiddenkey_rs.experiments import folder
from hiddenkey_rs.experiments.run_config import RunConfig
from hiddenkey_rs.experiments.sweep.reading import load_plan
from hiddenkey_rs.serialise import yaml_loader

PLAN = """
base: {{epochs: 1, lr: {lr}}}
tasks: {{demo: {{task: demo}}}}
methods: {{none: {{preset: none}}}}
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 0.001), ("1E-3", 0.001), ("-1.5e3", -1500.0), (".5e1", 5.0), ("5.e-1", 0.5), ("1.0e-3", 0.001)],
        *[("1e", "1e"), ("e3", "e3"), ("1e3x", "1e3x"), ("'1e3'", "1e3"), ("12", 12), ("0.1", 0.1), ("1_0e3", "1_0e3")],
    ],
)
def test_numbers_with_an_exponent(text: str, value: Any) -> None:
    import yaml

    found = yaml.load(text, yaml_loader())
    assert found == value
    assert type(found) is type(value)


def test_learning_rates_of_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: demo\nlr: 1e-3\nlayers: all\n")
    config = run_config(Namespace(config=str(file)))
    assert (config.lr, config.layers) == (0.001, ("all",))
    file.write_text(PLAN.format(lr="2e-3"))
    assert load_plan(file).search()[0].config.lr == 0.002
    assert hk.HiddenKeyConfig.from_yaml("hidden: {rate: 1e-1}").hidden.rate == 0.1
    file.write_text(PLAN.format(lr="fast"))
    with pytest.raises(hk.ConfigError, match=r"lr must be a number \(got 'fast' in .*run.yaml', line \d+\)"):
        load_plan(file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": "0.001"}, r"lr must be a number \(got '0.001'\); mend --lr"),
        ({"lr": True}, r"lr must be a number \(got True\)"),
        ({"lr": float("inf")}, "learning rate must be above 0"),
        ({"bf16": "yes"}, r"bf16 must be true or false \(got 'yes'\)"),
        ({"bf16": 1}, "bf16 must be true or false"),
        ({"rank": 8.0}, "rank must be a whole number"),
        ({"train_size": "5"}, r"train_size must be a whole number \(got '5'\); mend --train-size"),
        ({"model": None}, r"model must be a text \(got None\)"),
        ({"layers": [3.5]}, r"layers must be a list of words \(got \[3.5\]\)"),
        ({"warmup": 30}, r"warmup is a share, in \[0, 1\] \(got 30\)"),
        ({"label_smoothing": -0.1}, "label_smoothing is a share"),
        ({"weight_decay": -1}, r"weight decay must be at least 0 \(got -1\)"),
    ],
)
def test_values_of_the_wrong_kind(given: dict[str, Any], message: str) -> None:
    with pytest.raises(hk.ConfigError, match=message):
        RunConfig(**{"task": "demo", **given})


def test_values_of_the_right_kind() -> None:
    config = RunConfig(task="demo", lr=1, layers=[3, "encoder.1"], text_fields="text", bf16=True, train_size=5)
    assert (config.lr, config.layers, config.text_fields) == (1, ("3", "encoder.1"), ("text",))
    assert RunConfig.from_dict(config.to_dict()) == config


def test_places_that_cannot_be_written_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.format(lr=1))
    assert main(["sweep", str(plan), "--out", str(plan / "results")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "check the path" in said


@pytest.mark.parametrize("text", ['{"run": ', "[]", "{}", '{"run": 3}', "\xff"])
def test_a_damaged_run_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / folder.CONFIG).write_bytes(text.encode("latin-1"))
    assert main(["eval", "--run", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert folder.CONFIG in said


def test_help_lists_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens
    for item in fields(RunConfig):
        for choice in item.metadata["choices"] or ():
            text = shown.rpartition(f"--{item.name.replace('_', '-')}{item.name.upper()}")[2]
            assert choice in text[:500], (item.name, choice)
