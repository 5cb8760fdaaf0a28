"""What is written is true: README's code runs, docstrings run, names exist, nothing speaks of one machine."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

import families
import hiddenkey_rs as hk
from hiddenkey_rs.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
TARGETS = [
    "setup",
    "demo",
    "test",
    "lint",
    "bench",
    "stats",
    "gpu",
    "compat",
    "fuzz",
    "soak",
    "evidence",
    "results",
    "docs",
]
TARGETS += ["wheel", "all", "clean"]


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_code_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exec(BLOCKS[number], {"__name__": "__main__"})


def test_the_config_that_readme_shows_fits_a_model() -> None:
    names: dict[str, hk.HiddenKeyConfig] = {}
    exec(next(block for block in BLOCKS if "rate_pattern" in block), names)
    handle = hk.attach(families.build("bart", encoder_layers=6, decoder_layers=6), names["config"], stock_dropout="off")
    assert "decoder.layers.5" in str(handle.report())


def test_readme_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(r"^hiddenkey (\w+)(.*(?:\\\n.*)*)", README, flags=re.MULTILINE)
    assert len(lines) >= 4
    for command, rest in lines:
        words = [command, rest.split()[0]] if command == "bench" else [command]
        assert main([*words, "--help"]) == 0
        shown = capsys.readouterr().out
        for flag in re.findall(r"(--[a-z-]+)", rest):
            assert re.search(rf"{flag}(?![\w-])", shown), f"{command} {flag}"
    for preset in hk.PRESETS:
        family = re.sub(r"(element|column|span)$", "{element,column,span}", preset)
        assert f"`{preset}`" in README or f"`{family}`" in README, preset


def test_families_are_named() -> None:
    from hiddenkey_rs.attachment.families import FAMILIES

    section = re.sub(r"[-_.]", "", README.partition("\n## Families")[2].partition("\n## ")[0].lower())
    spelled = {"xlm-roberta-xl": "XLM-RoBERTa (and XL)"}
    for family in FAMILIES:
        name = re.escape(re.sub(r"[-_.]", "", spelled.get(family, family).lower()))
        assert re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", section), family
    assert f"{len(FAMILIES)} families" in README


def modules() -> list[str]:
    package = ROOT / "python" / "hiddenkey_rs"
    names = [path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py")]
    return sorted(".".join(name.parts).removesuffix(".__init__") for name in names if name.name != "__main__")


@pytest.mark.parametrize("name", modules())
def test_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    outcome = doctest.testmod(module)
    assert outcome.failed == 0


def test_public_names() -> None:
    for name in hk.__all__:
        value = getattr(hk, name)
        assert name in ("PRESETS", "__version__") or value.__doc__, name
    assert set(hk.__all__) <= set(dir(hk))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hk.nothing


def test_versions_agree() -> None:
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text())
    assert cargo["package"]["version"] == hk.__version__
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_make_targets() -> None:
    text = (ROOT / "Makefile").read_text()
    defined = {name for line in re.findall(r"^([a-z ]+):", text, flags=re.MULTILINE) for name in line.split()}
    assert set(TARGETS) <= defined
    assert set(COMMANDS) >= {"train", "eval", "doctor", "demo"}


def test_only_masks_and_batches_know_the_core() -> None:
    pattern = re.compile(r"import _core|_core import|hiddenkey_rs\._core")
    package = ROOT / "python" / "hiddenkey_rs"
    users = {path.relative_to(package).parts[0] for path in package.rglob("*.py") if pattern.search(path.read_text())}
    assert users == {"masks.py", "batches"}


def test_nothing_speaks_of_one_machine() -> None:
    # spelled apart so that this file does not find itself
    forbidden = re.compile(
        "/" + r"(work|root|home|tmp/hk)/|pypi" + r"\.org|python" + r"hosted|crates" + r"\.io-index|index\.crates"
    )
    for path in tracked():
        if (
            path.suffix in (".py", ".rs", ".md", ".toml", ".txt", ".yaml", ".jsonl", "")
            and path.name != "Cargo.lock"
            and path.is_file()
        ):
            found = forbidden.search(path.read_text(errors="ignore"))
            assert found is None, f"{path}: {found}"


def test_files_stay_small() -> None:
    for path in tracked():
        if path.suffix in (".py", ".rs"):
            assert len(path.read_text().splitlines()) <= 600, path
