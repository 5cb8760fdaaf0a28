"""Runs from the command line: the folder, determinism, resume, masks against the reference, errors and exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from hiddenkey_rs.cli.main import main
from hiddenkey_rs.experiments import models
from hiddenkey_rs.experiments.interrupts import interruptible
from reference import check_run

FAST = ["--rank", "2", "--batch-size", "8", "--log-every", "2", "--threads", "1"]
PAIRS = [
    ("a b c", "a b d", 0),
    ("x y", "x y", 1),
    ("long words here", "other words there", 0),
    ("same same", "same same", 1),
]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rows = [{"sentence1": a + f" {n}", "sentence2": b, "label": label} for n in range(10) for a, b, label in PAIRS]
    for name, part in (("train", rows[:32]), ("dev", rows[32:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return ["--train-file", str(tmp_path / "train.jsonl"), "--dev-file", str(tmp_path / "dev.jsonl")]


def train(files: list[str], out: Path, *flags: str) -> int:
    return main(["train", "--model", "gpt2-tiny", *files, *FAST, "--epochs", "2", "--out", str(out), *flags])


def figures(out: Path) -> dict[str, object]:
    found = json.loads((out / "metrics.json").read_text())
    return {
        name: value for name, value in found.items() if name not in ("examples_per_second", "seconds", "peak_rss_mb")
    }


def test_a_runs_folder(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(files, out) == 0
    printed = capsys.readouterr()
    assert "gpt2-tiny on train.jsonl, hiddenkey, seed 0" in printed.out
    assert "measured rates: attention 0." in printed.out
    assert "epoch 2: dev loss" in printed.err
    names = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "log.jsonl",
        "metrics.json",
        "curves.png",
        "adapter",
        "checkpoint-4",
        "checkpoint-8",
    } == names
    metrics = json.loads((out / "metrics.json").read_text())
    wanted = {
        "task",
        "model",
        "preset",
        "seed",
        "best_epoch",
        "train",
        "dev",
        "test",
        "examples_per_second",
        "seconds",
        "peak_rss_mb",
    }
    assert wanted <= metrics.keys()
    recorded = json.loads((out / "config.json").read_text())
    assert recorded["run"]["rank"] == 2
    assert recorded["hiddenkey"]["attention"]["pattern"] == "column"
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"step", "loss", "task_loss", "consistency_loss", "realised_rate_attention"} <= logged[0].keys()
    assert main(["eval", "--run", str(out), "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["dev"] == metrics["dev"], "the saved adapter is the best epoch's, to the last bit"


def test_the_same_command_gives_the_same_figures(files: list[str], tmp_path: Path) -> None:
    assert train(files, tmp_path / "a") == 0
    assert train(files, tmp_path / "b") == 0
    assert train(files, tmp_path / "c", "--activation-checkpointing") == 0
    assert train(files, tmp_path / "d", "--seed", "1") == 0
    assert figures(tmp_path / "a") == figures(tmp_path / "b") == figures(tmp_path / "c")
    assert figures(tmp_path / "a")["dev"] != figures(tmp_path / "d")["dev"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_bfloat16_on_a_cpu(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "multiplies_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="torch has no fast bfloat16 for this processor"):
        assert train(files, tmp_path / "a", "--bf16") == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*bfloat16")
        assert train(files, tmp_path / "b") == 0
        monkeypatch.setattr(models, "multiplies_bfloat16", lambda: True)
        models.settle(None, bf16=True)
    assert hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"), "torch is asked by a name that it may change"
    assert figures(tmp_path / "a")["dev"] != figures(tmp_path / "b")["dev"]


def test_resume_after_a_kill_ends_where_the_undisturbed_run_ends(files: list[str], tmp_path: Path) -> None:
    flags = ["--save-steps", "3", "--epochs", "4"]
    assert train(files, tmp_path / "whole", *flags) == 0
    command = [
        sys.executable,
        "-m",
        "hiddenkey_rs",
        "train",
        "--model",
        "gpt2-tiny",
        *files,
        *FAST,
        "--out",
        str(tmp_path / "cut"),
        *flags,
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    state = tmp_path / "cut" / "checkpoint-6" / "run_state.json"
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert main([*command[3:], "--resume"]) == 0
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    lines = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("cut", "whole")
    ]
    assert lines[0] == lines[1]


def stop_at(out: Path, step: int) -> None:
    """Make of a finished run what a kill after this step's checkpoint leaves."""
    (out / "metrics.json").unlink()
    for path in out.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize(("save_steps", "kept"), [("3", 6), ("4", 4)])
def test_resume_within_an_epoch_and_at_its_end(save_steps: str, kept: int, files: list[str], tmp_path: Path) -> None:
    """A checkpoint of an epoch's last step is older than the evaluation at its end, which must not get lost."""
    flags = ["--save-steps", save_steps, "--loader", "hiddenkey"]
    assert train(files, tmp_path / "run", *flags) == 0
    whole, logged = figures(tmp_path / "run"), (tmp_path / "run" / "log.jsonl").read_text()
    assert len(logged.splitlines()) == 6
    stop_at(tmp_path / "run", kept)
    (tmp_path / "run" / "checkpoint-7").mkdir()  # a kill while it was written
    assert train(files, tmp_path / "run", *flags, "--resume") == 0
    assert figures(tmp_path / "run") == whole
    assert (tmp_path / "run" / "log.jsonl").read_text() == logged


def test_resume_auto(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, flags = tmp_path / "run", ["--save-steps", "3", "--resume", "auto"]
    assert train(files, out, *flags) == 0, "nothing to resume: it starts"
    whole = figures(out)
    assert train(files, out, *flags) == 0, "finished: nothing is left to do"
    for step in (6, 0):  # stopped behind the first checkpoint, and before it
        stop_at(out, step)
        assert train(files, out, *flags, "--rank", "4") == 2
        assert "the stopped run made another choice (got rank=4, the run has 2)" in capsys.readouterr().err
        assert train(files, out, *flags) == 0
        assert figures(out) == whole
    assert train(files, out, "--resume", "maybe") == 2
    assert "invalid choice: 'maybe'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loader", "hiddenkey"], "has another loader (got --loader hiddenkey, the run has stock)"),
        (["--batch-size", "4"], "(got 1 process(es) of 1 x 4 rows, the run has 1 of 1 x 8)"),
        (["--accumulation", "2"], "(got 1 process(es) of 2 x 8 rows, the run has 1 of 1 x 8)"),
    ],
)
def test_a_stock_run_goes_on_as_it_was(flags: list[str], message: str, files, tmp_path: Path, capsys) -> None:
    assert train(files, tmp_path / "run", "--max-steps", "1") == 0
    (tmp_path / "run" / "metrics.json").unlink()
    assert train(files, tmp_path / "run", "--max-steps", "1", "--resume", *flags) == 2
    assert message in capsys.readouterr().err


def test_our_loader_goes_on_with_other_micro_batches(files: list[str], tmp_path: Path, capsys) -> None:
    ours = ["--loader", "hiddenkey", "--save-steps", "3"]
    assert train(files, tmp_path / "run", *ours) == 0
    whole = figures(tmp_path / "run")
    stop_at(tmp_path / "run", 6)
    assert train(files, tmp_path / "run", *ours, "--resume", "--batch-size", "4") == 2
    assert "takes steps of 8 rows (got 1 process(es) of 1 x 4 = 4)" in capsys.readouterr().err
    assert train(files, tmp_path / "run", *ours, "--resume", "--batch-size", "3", "--accumulation", "3") == 2
    assert train(files, tmp_path / "run", *ours, "--resume", "--batch-size", "2", "--accumulation", "4") == 0
    again = figures(tmp_path / "run")
    for part in ("train", "dev"):
        assert again[part] == pytest.approx(whole[part], abs=1e-6)


def test_token_budgets_from_the_command_line(files: list[str], tmp_path: Path, capsys) -> None:
    assert train(files, tmp_path / "run", "--token-budget", "300", "--max-steps", "5") == 0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["spread"] == {"processes": 1, "accumulation": 1, "rows": None, "loader": "hiddenkey"}
    assert train(files, tmp_path / "other", "--token-budget", "300", "--loader", "stock") == 2
    assert "the stock loader makes batches of rows (got token_budget=300)" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["element", "column", "span"])
def test_masks_drawn_in_a_run_are_the_references(files: list[str], tmp_path: Path, pattern: str) -> None:
    flags = ["--log-masks", "10", "--log-every", "1", "--max-steps", "10", "--epochs", "3", "--layers", "all"]
    patterns = ["--attention-pattern", pattern, "--hidden-pattern", pattern, "--rate", "0.2"]
    assert train(files, tmp_path / "run", *flags, *patterns) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "masks.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == set(range(10))
    assert {line["branch"] for line in lines} == {0, 1}
    assert {line["site"] for line in lines} == {"attention", "ffn"}
    assert check_run.main(str(tmp_path / "run")) == 0


def test_the_adapter_loads_with_peft_alone(files: list[str], tmp_path: Path) -> None:
    """In a Python where this package cannot be imported, with the same logits."""
    import torch

    from hiddenkey_rs.experiments import folder, models, run

    assert train(files, tmp_path / "run") == 0
    config = folder.load_config(tmp_path / "run")
    prepared = run.prepare(config)
    prepared.model.save_pretrained(tmp_path / "base")
    batch = prepared.collate(prepared.dev)
    torch.save({name: value for name, value in batch.items() if name != "labels"}, tmp_path / "batch.pt")
    ours = models.load_adapter(prepared.model, tmp_path / "run" / "adapter")
    with torch.no_grad():
        expected = ours(**{name: value for name, value in batch.items() if name != "labels"}).logits
    code = f"""
import sys
sys.modules["hiddenkey_rs"] = None
import torch, transformers, peft
torch.set_num_threads(1)
base = transformers.AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
model = peft.PeftModel.from_pretrained(base, {str(tmp_path / "run" / "adapter")!r}).eval()
with torch.no_grad():
    torch.save(model(**torch.load({str(tmp_path / "batch.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_language_modelling_and_regression(tmp_path: Path) -> None:
    rows = [{"source": f"name : {n}", "target": f"The name is {n}.", "score": n / 7} for n in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["train", "--model", "gpt2-tiny", "--train-file", str(path), *FAST, "--max-steps", "2"]
    assert main([*common, "--kind", "lm", "--text-fields", "source", "target", "--out", str(tmp_path / "lm")]) == 0
    assert figures(tmp_path / "lm")["dev"].keys() == {"loss", "perplexity", "token_accuracy"}
    number = ["--kind", "regression", "--text-fields", "target", "--label-field", "score"]
    assert main([*common, *number, "--out", str(tmp_path / "number")]) == 0
    assert figures(tmp_path / "number")["dev"].keys() == {"loss", "pearson", "spearman"}


def test_a_smaller_training_set_is_the_sweeps_subset(files: list[str], tmp_path: Path) -> None:
    from hiddenkey_rs.experiments import folder
    from hiddenkey_rs.experiments.run import load_splits
    from hiddenkey_rs.experiments.run_config import RunConfig
    from hiddenkey_rs.experiments.sweep.plan import Protocol
    from hiddenkey_rs.experiments.sweep.selection import split_rows

    assert train(files, tmp_path / "run", "--train-size", "9", "--seed", "3", "--epochs", "1") == 0
    config = folder.load_config(tmp_path / "run")
    assert config.train_size == 9
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["history"][-1]["step"] == 2, "nine rows by eight"
    for run in (config, RunConfig(task="demo", train_size=9, seed=3)):
        _, whole = load_splits(dataclasses.replace(run, train_size=None))
        _, some = load_splits(run)
        assert some.train == split_rows(whole, 9, Protocol(select_rows=20), seed=3)[0]
        assert some.train == split_rows(whole, 12, Protocol(select_from="dev"), seed=3)[0][:9]
        assert (some.dev, some.labels) == (whole.dev, whole.labels)


def test_choices_from_a_file_and_overrides(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: gpt2-tiny\nrank: 3\npreset: dropkey-span\nepochs: 1\nmax_steps: 1\n")
    flags = [
        "--rank",
        "2",
        "--hidden-rate",
        "0.2",
        "--consistency",
        "js",
        "--layers",
        "1",
        "3",
        "--rate-pattern",
        "h.3=0.4",
    ]
    assert main(["train", "--config", str(tmp_path / "run.yaml"), *files, *flags, "--out", str(tmp_path / "run")]) == 0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (recorded["run"]["rank"], recorded["run"]["preset"]) == (2, "dropkey-span")
    drops = recorded["hiddenkey"]
    assert drops["attention"]["pattern"] == "span"
    assert drops["hidden"]["rate"] == 0.2
    assert drops["consistency"]["kind"] == "js"
    assert {(row["layer"], row["rate"]) for row in recorded["report"]["rows"]} == {(1, 0.1), (1, 0.2), (3, 0.4)}
    assert main(["train", "--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert figures(tmp_path / "again") == figures(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rate", "1.5"], "rate must be a number in [0, 1) (got 1.5)"),
        (["--preset", "hidenkey"], "unknown preset (got 'hidenkey'); did you mean 'hiddenkey'?"),
        (["--layers", "9"], "a layer lies beyond the model (got 9, the decoder has 4 layer(s))"),
        (["--text-fields", "premise"], "the text field 'premise' is absent"),
        (["--label-field", "gold"], "the label field 'gold' is absent"),
        (["--kind", "lm"], "needs two text fields"),
        (["--train-size", "33"], "there are too few training rows (got train_size 33 of 32); lower train_size"),
        (["--train-size", "0"], "train_size must be a whole number above 0 (got 0)"),
        (["--seed", "4294967296"], "the seed must lie in 0..2^32-1, as NumPy's generators ask (got 4294967296)"),
        (["--seed", "-1"], "the seed must lie in 0..2^32-1"),
        (["--alpha", "nan"], "LoRA's alpha must be above 0 (got nan)"),
        (["--rank", "0"], "rank must be a whole number above 0 (got 0)"),
        (["--target-modules", "q_proj"], "LoRA does not fit the model"),
        (["--dev-file", "nowhere.jsonl"], "there is no such data file (got 'nowhere.jsonl')"),
        (["--model", "nowhere"], "the model cannot be loaded (got 'nowhere'"),
        (["--resume"], "there is no run to resume"),
        (["--task", "mrpc"], "exactly one source of data is needed"),
        (["--consistency", "kll"], "unknown consistency (got 'kll'); did you mean 'kl'?"),
        (["--hiddenkey", "nowhere.yaml"], "the config cannot be read (got 'nowhere.yaml'"),
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["--preset", "r-drop", "--stock-dropout", "off"], "two passes of the consistency term would be identical"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(files, flags, message, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    if "--text-fields" not in flags and "--kind" in flags:
        flags = [*flags, "--text-fields", "sentence1"]
    assert train(files, out, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith("hiddenkey: error: ")
    assert message in error
    assert "Traceback" not in error
    assert not out.exists(), "nothing half-done"


def test_a_run_that_diverges_fails_with_one_line_and_exit_1(files, tmp_path, capsys) -> None:
    assert train(files, tmp_path / "run", "--lr", "1e30", "--log-every", "1") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hiddenkey: error: training diverged (got loss nan at step")


def test_a_missing_extra_is_named(files, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert train(files, tmp_path / "run") == 2
    assert "with its extra [train]" in capsys.readouterr().err


def test_a_folder_that_is_taken(files: list[str], tmp_path: Path, capsys) -> None:
    assert train(files, tmp_path / "run", "--max-steps", "1") == 0
    assert train(files, tmp_path / "run", "--max-steps", "1") == 2
    assert "the output folder holds another run" in capsys.readouterr().err
    assert train(files, tmp_path / "run", "--max-steps", "1", "--resume") == 2
    assert "the run is finished" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.json").unlink()
    assert train(files, tmp_path / "run", "--max-steps", "1", "--resume", "--rank", "4") == 2
    assert "the stopped run made another choice (got rank=4, the run has 2)" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert train(files, tmp_path / "other") == 2
    assert "holds other files" in capsys.readouterr().err
    assert main(["eval", "--run", str(tmp_path / "other")]) == 2
    assert "the folder holds no run" in capsys.readouterr().err


def test_help_version_doctor_and_unknown_commands(capsys) -> None:
    started = time.perf_counter()
    help_text = subprocess.run(
        [sys.executable, "-m", "hiddenkey_rs", "train", "--help"], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - started < 2
    assert "--activation-checkpointing" in help_text.stdout
    assert main(["--version"]) == 0
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "hiddenkey: error: argument COMMAND: invalid choice: 'trian'" in capsys.readouterr().err
    assert main(["doctor", "--model", "gpt2-tiny"]) == 0
    printed = capsys.readouterr().out
    assert "stream        hk1" in printed
    assert "supported     yes" in printed
    assert "dropkey column" in printed


def test_ctrl_c_is_130(files: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hiddenkey_rs",
        "train",
        "--model",
        "gpt2-tiny",
        *files,
        *FAST,
        "--epochs",
        "500",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*/run_state.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().endswith("hiddenkey: interrupted")
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_swallowed_is_found() -> None:
    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # the handler runs in here, and what it raises is ignored

    with interruptible() as check:
        check()
        Finalised()
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_minilm_learns_the_demo_task(minilm: Path, tmp_path: Path) -> None:
    flags = [
        "train",
        "--model",
        "minilm",
        "--task",
        "demo",
        "--preset",
        "hiddenkey-minus",
        "--max-steps",
        "12",
        "--log-every",
        "4",
    ]
    assert main([*flags, "--train-eval-rows", "50", "--dev-rows", "50", "--out", str(tmp_path / "run")]) == 0
    assert figures(tmp_path / "run")["train"]["loss"] < 0.75


@pytest.mark.parametrize("written", ['{"run": []}', '{"run": {"task": "sst2"}}', "{}", "[]", "{"])
def test_the_demo_keeps_what_is_not_a_demos(written: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "config.json").write_text(written)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert str(folder) in capsys.readouterr().err
    assert (folder / "config.json").read_text() == written
