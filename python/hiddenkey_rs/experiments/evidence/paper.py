"""The paper's numbers, to print beside ours, and its figure 4 where the user has it ("LoRA Meets Dropout", arXiv 2403.00812).

Methods go by the names of our presets, tasks by the names of ours. All classification and regression scores are percent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...config import HiddenKeyConfig
from ...errors import DataError

Scores = Mapping[str, tuple[float, float]]
"""Task -> (median of 5 seeds, their standard deviation)."""

_TASKS = ("rte", "mrpc", "stsb", "sst2")


def _row(*cells: float) -> Scores:
    return dict(zip(_TASKS, zip(cells[::2], cells[1::2], strict=True), strict=True))


ROBERTA: Mapping[str, Scores] = {
    "none": _row(84.48, 0.98, 89.95, 0.50, 91.96, 0.48, 95.99, 0.25),
    "hiddencut-element": _row(87.00, 1.14, 90.69, 0.42, 91.94, 0.28, 96.10, 0.42),
    "hiddencut-column": _row(86.64, 0.80, 90.20, 0.80, 91.96, 0.11, 96.22, 0.19),
    "hiddencut-span": _row(86.64, 1.63, 90.69, 0.22, 92.05, 0.35, 96.10, 0.30),
    "dropkey-element": _row(87.00, 1.08, 90.93, 1.06, 92.21, 0.21, 96.22, 0.25),
    "dropkey-column": _row(87.36, 1.70, 90.93, 0.40, 92.25, 0.13, 96.22, 0.24),
    "dropkey-span": _row(86.28, 0.94, 90.69, 0.69, 92.21, 0.21, 96.22, 0.25),
    "dropattention-element": _row(85.56, 11.73, 90.20, 3.07, 92.03, 0.27, 95.76, 0.30),
    "dropattention-column": _row(85.56, 1.80, 90.20, 0.71, 92.11, 0.28, 95.87, 0.21),
    "dropattention-span": _row(86.28, 0.60, 89.95, 0.61, 92.21, 0.36, 96.10, 0.39),
    "hiddenkey-minus": _row(87.70, 0.91, 90.90, 0.72, 92.28, 0.19, 96.22, 0.13),
    "hiddenkey": _row(88.10, 1.60, 91.20, 0.90, 92.30, 0.11, 96.44, 0.20),
    "hiddenkey-js": _row(87.70, 1.72, 90.90, 0.47, 92.24, 0.21, 96.22, 0.24),
    "hiddenkey-input": _row(88.50, 2.11, 90.70, 1.03, 92.11, 0.14, 96.33, 0.27),
    "hiddenkey-output": _row(87.70, 2.24, 90.70, 1.20, 92.19, 0.11, 96.22, 0.15),
}
"""RoBERTa-large on the development rows, every cell the best of 6 to 8 rates on those same rows."""

OTHERS: Mapping[str, Mapping[str, float]] = {
    "none": {"cola": 67.96, "qnli": 94.23},
    "hiddenkey": {"cola": 69.91, "qnli": 95.04},
}
"""RoBERTa-large on the two tasks that only these methods were run on."""

LLAMA: Mapping[str, Mapping[str, float]] = {
    "none": {"rte": 88.45, "mrpc": 88.73},
    "hiddenkey": {"rte": 90.25, "mrpc": 89.46},
}
"""LLaMA2-7B, of classification; its BLEU on E2E stands in :data:`TEXTS`."""

TEXTS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "none": {
        "e2e": {"bleu": 68.50, "nist": 8.615, "meteor": 46.43, "rouge_l_coco": 71.08, "cider": 2.490},
        "webnlg": {"bleu": 54.78, "bleu_seen": 62.30, "bleu_unseen": 45.53},
        "e2e (LLaMA2-7B)": {"bleu": 66.71},
    },
    "hiddenkey": {
        "e2e": {"bleu": 69.76, "nist": 8.765, "meteor": 46.80, "rouge_l_coco": 71.78, "cider": 2.511},
        "webnlg": {"bleu": 55.27, "bleu_seen": 62.49, "bleu_unseen": 46.48},
        "e2e (LLaMA2-7B)": {"bleu": 69.02},
    },
}
"""GPT2-Medium (LLaMA2-7B where it says so): method -> task -> metric -> mean of 3 seeds."""


@dataclass(frozen=True)
class Layout:
    """One of the paper's tables: its methods from top to bottom."""

    key: str
    title: str
    methods: tuple[str, ...]


_POSITIONS = ("hiddencut", "dropkey", "dropattention")
LAYOUTS = (
    Layout(
        "single",
        "Single methods x patterns",
        ("none", *(f"{position}-{pattern}" for position in _POSITIONS for pattern in ("element", "column", "span"))),
    ),
    Layout("compensation", "Compensation", ("none", "hiddenkey-minus", "hiddenkey", "hiddenkey-js")),
    Layout("ends", "Input and output", ("none", "hiddenkey-minus", "hiddenkey-input", "hiddenkey-output")),
)


def score(method: str, task: str, model: str = "") -> tuple[float, float | None] | None:
    """The paper's (score, standard deviation if printed) of a method on a task; ``None`` where it has none.

    Example:
        >>> score("hiddenkey", "rte")
        (88.1, 1.6)
        >>> score("hiddenkey", "rte", model="some/Llama-2-7b")
        (90.25, None)
    """
    if is_llama(model):
        value = LLAMA.get(method, {}).get(task)
        return None if value is None else (value, None)
    if task in ROBERTA.get(method, {}):
        return ROBERTA[method][task]
    value = OTHERS.get(method, {}).get(task)
    return None if value is None else (value, None)


def is_llama(model: str) -> bool:
    """Whether a model's name says that the paper's LLaMA stands beside it."""
    return "llama" in model.lower()


def texts(method: str, task: str, model: str = "") -> Mapping[str, float]:
    """The paper's metrics of generated texts: LLaMA2-7B's for a LLaMA, else GPT2-Medium's; empty where it has none.

    Example:
        >>> texts("hiddenkey", "e2e", model="some/Llama-2-7b")
        {'bleu': 69.02}
    """
    return TEXTS.get(method, {}).get(f"{task} (LLaMA2-7B)" if is_llama(model) else task, {})


def name_of(config: HiddenKeyConfig) -> str | None:
    """The preset that drops in the same places as a config, whatever its rates; the paper's rows go by these names."""
    return _PLACES.get(_places(config))


def _places(config: HiddenKeyConfig) -> tuple[object, ...]:
    consistency = config.consistency and (config.consistency.kind, config.consistency.gradient)
    attention = config.attention and (config.attention.position, config.attention.pattern)
    return attention, config.hidden and config.hidden.pattern, bool(config.input), bool(config.output), consistency


_PLACES = {_places(HiddenKeyConfig.preset(preset)): preset for preset in ROBERTA}

Curves = Mapping[str, Mapping[str, list[tuple[float, float]]]]
"""Task -> method -> (rate, score in percent)."""

_FIGURE = "paper_fig4.json"


def figure_4(folder: str | Path | None) -> Curves:
    """The paper's rate curves, read off its figure 4, from ``paper_fig4.json`` in the data folder; empty where it is missing.

    Raises:
        DataError: the file is not of the form task -> method -> [[rate, score], ...].
    """
    if folder is None or not (path := Path(folder) / _FIGURE).is_file():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return {
            task.lower().replace("-", ""): {
                _preset(method): [(float(rate), float(value)) for rate, value in points]
                for method, points in methods.items()
            }
            for task, methods in held.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"the paper's curves cannot be read (got {str(path)!r}: {' '.join(str(error).split())}); write task -> "
            "method -> [[rate, score], ...], or leave the file out"
        ) from None


def _preset(method: str) -> str:
    return "none" if method == "baseline" else method.replace("dropattn", "dropattention").replace("_", "-")
