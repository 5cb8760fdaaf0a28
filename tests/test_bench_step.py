"""``hiddenkey bench step`` and ``make gpu``: rows, peak memory, parts, and that a wrong step is never timed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hiddenkey_rs.benchmarks import step, step_checks, step_memory, step_models, step_profile
from hiddenkey_rs.benchmarks.harness import Row
from hiddenkey_rs.benchmarks.step_models import MINUS, NONE, Runner, Shape
from hiddenkey_rs.cli.main import main
from hiddenkey_rs.ops import sdpa

ROOT = Path(__file__).resolve().parent.parent
ENCODER = Shape("encoder", layers=2, hidden=16, heads=2, vocab=40, length=9, batch=3)
DECODER = replace(ENCODER, model="decoder", layers=4)
KEYS = {"bench", "case", "sizes", "threads", "device", "simd", "unit", "ours", "peer", "speedup", "goal", "met"}
KEYS |= {"checked", "versions", "cpu", "commit"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "QUICK", replace(step.QUICK, shapes=(ENCODER, DECODER), samples=2, budget=0.0))


def quick(*flags: str) -> int:
    return main(["bench", "step", "--quick", "--threads", "1", *flags])


def test_rows_parts_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, picture = tmp_path / "step.jsonl", tmp_path / "step.png"
    assert quick("--profile", "--no-memory", "--json", str(lines), "--plot", str(picture)) == 0
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    for row in rows:
        assert set(row) == KEYS
        assert row["checked"] is True
        assert row["ours"]["n"] == 2
        assert row["goal"] is None, "toy sizes have no goals"
    pairs = {(row["case"], row["peer"]["name"]) for row in rows}
    for model in (ENCODER.label, DECODER.label):
        for ours, peer in (
            ("HiddenKey-", "lora_dropout=0.1"),
            ("HiddenKey-", "no dropout"),
            ("HiddenKey", "no dropout"),
            ("r-drop preset", "R-Drop, doubled batch"),
        ):
            assert (f"{model}, {ours}", peer) in pairs
    for ours, peer in (("HiddenKey, checkpointing", "no dropout, checkpointing"), ("stock dropout", "no dropout")):
        assert (f"{ENCODER.label}, {ours}", peer) in pairs
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for part in ("attention", "adapters", "FFN", "loss head", "optimiser"):
        assert any(line.startswith(part) for line in printed.splitlines()), part


def test_parts_go_where_they_belong() -> None:
    base = step_models.base_model(ENCODER, "cpu")
    runners = {variant: Runner(ENCODER, variant, base, "cpu") for variant in (NONE, MINUS, step_models.FULL)}
    for runner in runners.values():
        runner.step()
    lines = dict(step_profile.profile(runners, "cpu"))
    milliseconds = {part: {name: float(text) for name, text in line.items()} for part, line in lines.items()}
    assert set(milliseconds) == {*step_profile._ORDER, "all of them"}
    for part in ("attention", "FFN", "adapters", "optimiser"):
        assert all(value > 0 for value in milliseconds[part].values()), part
    for part in ("HiddenCut", "masks and plan"):
        assert milliseconds[part]["no dropout"] == 0 < milliseconds[part]["HiddenKey-"]
    assert milliseconds["second pass"]["HiddenKey-"] == 0 < milliseconds["second pass"]["HiddenKey"]


@pytest.mark.parametrize("broken", ["attention", "gradient"])
def test_a_wrong_step_exits_1(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    real = sdpa.attention

    def wrong(query, key, value, **named):
        output = real(query, key, value, **named)
        return output * 1.1 if broken == "attention" else output + value.mean() - value.mean().detach()

    monkeypatch.setattr(sdpa, "attention", wrong)
    lines = tmp_path / "step.jsonl"
    assert quick("--no-memory", "--models", "encoder", "--json", str(lines)) == 1
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    for row in rows:
        named = {row["case"].removeprefix(f"{ENCODER.label}, "), row["peer"]["name"]}
        wrong_ones = {name for name in named if name.startswith("HiddenKey")}
        assert row["checked"] is not bool(wrong_ones), named
        assert (row["ours"]["median"] is None) == bool(wrong_ones)
    printed = capsys.readouterr()
    assert f"check failed: {ENCODER.label}, HiddenKey-: its loss or gradients differ from those of the reference" in (
        printed.err
    )
    assert "UNCHECKED" in printed.out


def test_runners_share_frozen_weights_and_begin_alike() -> None:
    base = step_models.base_model(DECODER, "cpu")
    one, other = (Runner(DECODER, variant, base, "cpu") for variant in (NONE, MINUS))
    mine, theirs = (dict(runner.model.named_parameters()) for runner in (one, other))
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name])
        assert (weight.data_ptr() == theirs[name].data_ptr()) is not weight.requires_grad
    trained = [name for name, weight in mine.items() if weight.requires_grad]
    assert trained
    assert all("lora_A" in name or "lora_B" in name for name in trained)


@pytest.mark.slow
def test_peak_memory_of_a_process_each() -> None:
    large = replace(DECODER, length=64, batch=64, vocab=4000)
    found = step_memory.on_cpu(large, [NONE, step_models.DOUBLED], 1)
    logits = 64 * 64 * 4000 * 4 / (1 << 20)
    assert found[NONE] > logits, "MiB"
    assert found[step_models.DOUBLED] > found[NONE] + logits


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "samples must be at least 1 (got 0)"),
        (["--layers", "0"], "layers must be at least 1 (got 0)"),
        (["--hidden", "30", "--heads", "4"], "hidden must be an even multiple of heads (got 30 for 4 heads)"),
        (["--models", "diffusion"], "invalid choice: 'diffusion'"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick(*flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_goals_of_the_issue() -> None:
    bounds = {(ours.name, peer.name): limits for ours, peer, *limits in step._COMPARED if limits[0] is not None}
    assert bounds["HiddenKey-", "lora_dropout=0.1"] == [1.00, 1.00]
    assert bounds["HiddenKey-", "no dropout"] == [1.03, 1.03]
    assert bounds["HiddenKey", "no dropout"] == [1.50, 1.30]
    assert bounds["HiddenKey, checkpointing", "no dropout, checkpointing"][0] == 1.40
    assert {(ours.name, limit) for ours, _, limit in step._MEMORY} >= {("HiddenKey-", 1.02), ("HiddenKey", 1.10)}


@pytest.mark.slow
def test_make_gpu_needs_cuda_and_can_be_rehearsed(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benches" / "gpu.py"), "--out", str(tmp_path)]
    if not torch.cuda.is_available():
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == "make gpu: this machine has no CUDA device that torch can use; nothing was run\n"
    pytest.importorskip("triton")
    done = subprocess.run([*script, "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "gpu_dry_run.jsonl").read_text().splitlines()]
    assert {row["bench"] for row in rows} == {"kernels", "hidden", "attention", "step"}
    assert all(row["checked"] for row in rows)
    steps = {row["case"].partition(", ")[2] for row in rows if row["bench"] == "step"}
    assert {"HiddenKey-, Triton", "HiddenKey, Triton"} <= steps, (
        "attached models through the kernels, compared and timed"
    )
    text = (tmp_path / "gpu_dry_run.md").read_text()
    assert "6 of 6 kernel checks right" in text
    assert "| element dropattention" in text


@pytest.mark.parametrize(
    ("sections", "code", "said"),
    [
        ({"nothing": 9.0}, 1, "Could not be run:\n\n* nothing, part 0: KeyError: 'nothing'"),
        ({"kernels": -1.0}, 3, "Left out for lack of time: 5 part(s) of kernels."),
    ],
)
def test_make_gpu_says_what_it_did_not_do(
    sections: dict[str, float], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benches" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", gpu)  # where dataclasses look for their module
    spec.loader.exec_module(gpu)
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert gpu.Run(tmp_path, dry=True, seconds=60.0).everything() == code
    assert said in (tmp_path / "gpu_dry_run.md").read_text()


def test_thread_counts_are_kept_apart(tmp_path: Path) -> None:
    def row(threads: int, ours: float) -> Row:
        one, other = ({"median": x, "p10": x, "p90": x, "n": 2} for x in (ours, 2 * ours))
        case = f"{ENCODER.label}, HiddenKey-"
        return Row(
            "step", case, asdict(ENCODER), threads, "ms", one, {"name": NONE.name, **other}, about={"profile": []}
        )

    rows = [row(1, 8.0), row(2, 3.0)]
    models = step._by_model(rows)
    assert list(models) == [f"{ENCODER.label}, {n} thread(s)" for n in (1, 2)]
    assert [len(mine) for mine in models.values()] == [1, 1]
    assert list(step._by_model(rows[:1])) == [ENCODER.label]
    step.plot(rows, str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_an_accelerators_turn_is_of_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(step.devices, "wait", lambda device: calls.append("wait"))
    runners = {NONE: SimpleNamespace(step=lambda: calls.append("step"))}
    for device, steps in (("cpu", 1), ("cuda", step._TURN)):
        calls.clear()
        found = step._alternate(runners, replace(step.QUICK, device=device, samples=2, budget=0.0))
        assert calls == ["step", "wait", *(["wait", *["step"] * steps, "wait"] * 2)]
        assert len(found[NONE]) == 2
    assert list(step_profile._measures("cuda")) == ["", "host, "]


def test_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_memory, "on_cpu", lambda _, chosen, __: dict.fromkeys(chosen, 10.0))
    lines = tmp_path / "step.jsonl"
    assert quick("--memory-only", "--models", "encoder", "--json", str(lines)) == 0
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {row["unit"] for row in rows} == {"MiB"}
    assert all(row["checked"] and "peak memory" in row["case"] for row in rows)


def test_deep_models_are_compared_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = replace(ENCODER, layers=13)
    base = step_models.base_model(deep, "cpu")
    runners = {variant: Runner(deep, variant, base, "cpu") for variant in (NONE, MINUS)}
    cut = []
    monkeypatch.setattr(step_checks, "Runner", lambda shape, *rest: cut.append(shape.layers) or Runner(shape, *rest))
    assert step_checks.passing(runners, base, "cpu") == {NONE, MINUS}
    assert set(cut) == {4}
    real = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args, **named: real(*args, **named) * 1.1)
    assert step_checks.passing(runners, base, "cpu") == {NONE}
