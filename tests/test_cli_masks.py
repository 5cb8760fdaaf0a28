"""``hiddenkey masks``: the picture is the mask."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from hiddenkey_rs import MaskKey, masks
from hiddenkey_rs.cli.main import main
from hiddenkey_rs.experiments import mask_picture

HALVES = {"█": (True, True), "▀": (True, False), "▄": (False, True), " ": (False, False)}


def show(monkeypatch: pytest.MonkeyPatch, *flags: str, width: int = 80, encoding: str = "utf-8") -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["masks", *flags]) == 0
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()


def bits(lines: list[str], length: int) -> np.ndarray:
    """The panel that stands alone in half blocks, as bools."""
    start = next(n for n, line in enumerate(lines) if line.startswith("sample")) + 1
    panel = [line.ljust(length) for line in lines[start : start + -(-length // 2)]]
    return np.array([[HALVES[sign][half] for sign in line[:length]] for line in panel for half in (0, 1)])[:length]


@pytest.mark.parametrize("length", [1, 9, 24])
@pytest.mark.parametrize("pattern", ["element", "column", "span"])
def test_blocks_are_the_bits(pattern: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ["--seed", "7", "--step", "6", "--branch", "1", "--layer", "3", "--site", "ffn", "--sample", "5"]
    lines = show(monkeypatch, "--pattern", pattern, "--rate", "0.3", "--length", str(length), *place)
    key = MaskKey(7, 6, 1, 3, "ffn")
    expected = {
        "element": lambda: masks.element(key, [5], length, length, 0.3),
        "column": lambda: masks.column(key, [5], length, 0.3),
        "span": lambda: masks.span(key, [5], [length], 0.3),
    }[pattern]().to_bool()[0, 0]
    assert np.array_equal(bits(lines, length), np.broadcast_to(expected, (length, length)))
    assert lines[0].startswith(f"{pattern}, ffn of layer 3, rate 0.3 (realised {masks.realised(0.3):.5f}), kept ")
    assert f"kept {expected.mean():.4f}; seed 7, step 6, branch 1" in lines[0]


def test_panels_stand_side_by_side_within_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--pattern", "element", "--rate", "0.5", "--length", "20", "--heads", "3", "--sample", "4", "9"]
    wide = show(monkeypatch, *flags, width=200)
    narrow = show(monkeypatch, *flags, width=45)
    assert sum(line.startswith("sample") for line in wide) == 1
    assert sum(line.startswith("sample") for line in narrow) == 3
    assert max(len(line) for line in narrow[1:]) <= 45
    expected = masks.element(MaskKey(), [4, 9], 20, 20, 0.5, heads=3).to_bool().reshape(6, 20, 20)
    start = next(n for n, line in enumerate(wide) if line.startswith("sample")) + 1
    for n in range(6):
        panel = [line.ljust(132)[22 * n : 22 * n + 20] for line in wide[start : start + 10]]
        assert np.array_equal([[HALVES[sign][half] for sign in line] for line in panel for half in (0, 1)], expected[n])


def test_plain_ascii_and_too_wide_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = show(monkeypatch, "--pattern", "element", "--length", "30", "--rate", "0.4", width=12, encoding="ascii")
    keep = masks.element(MaskKey(), [0], 30, 30, 0.4).to_bool()[0, 0, :12, :12]
    assert lines[3:15] == ["".join("#" if place else "." for place in row) for row in keep]
    assert lines[-1] == "# kept, . dropped; the first 12 of 30 rows and columns"


@pytest.mark.parametrize("pattern", ["element", "column", "span"])
def test_a_png_is_written(pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"{pattern}.png"
    flags = ["--pattern", pattern, "--rate", "0.2", "--length", "32", "--heads", "9", "--sample", "1", "2"]
    assert main(["masks", *flags, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert str(out) in capsys.readouterr().out


def test_the_png_shows_the_bits(tmp_path: Path) -> None:
    """Every panel's colours, read back from the file, are the mask's."""
    import matplotlib.image

    keep = mask_picture.drawn("element", MaskKey(seed=3), [8], 12, 0.5)
    mask_picture.draw(keep, [8], tmp_path / "one.png", ("query", "key"), "title; rest")
    pixels = matplotlib.image.imread(tmp_path / "one.png")[..., :3]
    dropped = np.isclose(pixels, np.array([0xD5, 0x5E, 0x00]) / 255, atol=0.01).all(axis=-1)
    kept = np.isclose(pixels, np.array([0xE8, 0xEE, 0xF4]) / 255, atol=0.01).all(axis=-1)
    # The legend's two patches stand below; the panel is what is left of the coloured pixels above them.
    coloured = dropped | kept
    rows = np.flatnonzero(coloured.sum(axis=1) > 0.3 * coloured.sum(axis=1).max())
    columns = np.flatnonzero(coloured[rows].any(axis=0))
    panel = dropped[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    tall, wide = panel.shape
    centres = np.arange(12) + 0.5
    found = panel[np.ix_((centres * tall / 12).astype(int), (centres * wide / 12).astype(int))]
    assert np.array_equal(~found, keep[0, 0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pattern", "row"], "invalid choice: 'row'"),
        (["--rate", "1.5"], "rate must be a number in [0, 1] (got 1.5)"),
        (["--length", "0"], "a picture's length must lie in 1..=4096 (got 0)"),
        (["--length", "4097"], "(got 4097)"),
        (["--heads", "65"], "a picture holds 1 to 64 panels (got 1 sample(s) of 65 head(s))"),
        (["--heads", "-1"], "of -1 head(s)"),
        (["--heads", "5", "--length", "4096"], "(got 5 panels of length 4096)"),
        (["--seed", "-1"], "seed must be an integer in 0..=18446744073709551615 (got -1)"),
        (["--site", "atention"], "invalid choice: 'atention'"),
        (["--sample", "-1"], "sample ids must lie in 0..=1099511627775 (got -1)"),
        (["--out", "{tmp}/none/mask.png"], "the file cannot be written (got"),
        (["--out", "{tmp}/mask.doc"], "let the name end in .png"),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["masks", *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hiddenkey: error: ")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
