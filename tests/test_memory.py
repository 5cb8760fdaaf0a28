"""The peak of a stretch of work is that stretch's, and where the system cannot tell it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from hiddenkey_rs.experiments import memory
from hiddenkey_rs.experiments.memory import PeakMemory

LARGE = 256 << 20


def touched() -> bytearray:
    held = bytearray(LARGE)
    held[::4096] = b"x" * len(held[::4096])
    return held


def test_only_the_peak_between_begin_and_end_counts() -> None:
    peak = PeakMemory()
    peak.begin()
    if peak.of != "training":
        pytest.skip(f"this system tells the peak of another thing: {peak.of}")
    touched()  # and let go: whoever worked before
    peak.begin()
    peak.end()
    small = peak.mib
    assert small is not None
    peak.begin()
    touched()
    peak.end()
    large = peak.mib
    assert large is not None
    assert large - small > 0.9 * LARGE / 2**20
    peak.begin()
    peak.end()
    assert peak.mib == large, "the largest of several stretches"


def test_a_system_that_cannot_forget_gives_the_whole_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path / "nowhere")
    monkeypatch.setattr(memory, "on_cpus", lambda: True)
    peak = PeakMemory()
    assert peak.mib is None
    peak.begin()
    peak.end()
    assert peak.of == "process"
    assert peak.mib == pytest.approx(memory.since_start(), rel=0.01)
