"""What a rank trains, as a few short texts, so that ranks can compare it before the first step."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from ..config import HiddenKeyConfig
from .ranks import Parts

SPOTS = 64
"""Examples of a data set without a digest of its own that are looked at, spread over it."""

_SETTINGS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "eval_strategy",
)
_PACKAGES = ("hiddenkey_rs", "torch", "transformers", "peft")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def run_parts(config: HiddenKeyConfig, stock_dropout: str, arguments: Any, model: nn.Module | None) -> dict[str, str]:
    """The parts of a run that must be equal on all ranks, but for its data. Without a model: weights may differ."""
    return {
        **{f"config {name}": repr(value) for name, value in config.to_dict().items()},
        "stock_dropout": stock_dropout,
        **{f"argument {name}": str(getattr(arguments, name, None)) for name in _SETTINGS},
        **{f"version of {name}": version(name) for name in _PACKAGES},
        "Python": platform.python_version(),
        "weights": "not yet loaded" if model is None else weights_digest(model),
    }


def data_parts(data: Any) -> Parts:
    """The parts of a data set: how many examples, and a digest; its own, or that of :data:`SPOTS` of them."""
    sized = has_length(data)
    found = {"data set's size": str(len(data)) if sized else "unknown"}
    if isinstance(digest := getattr(data, "digest", None), str):
        return {**found, "data": digest}
    # Iterable ones inherit a __getitem__ from torch's data sets, and may have a length besides.
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__") or not sized or not len(data):
        return found
    rows = sorted({int(row) for row in np.linspace(0, len(data) - 1, SPOTS)})
    spots = _spots(data, rows)
    # Examples that are made anew each time they are asked for say nothing.
    return {**found, "data": spots} if _spots(data, rows) == spots else found


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits of all parameters: their names, the sums of their bits as integers, and which are trained.

    Cheap enough for the start of every run: each weight is read once, where it lies. It is no defence against somebody
    who wants to deceive it.

    Example:
        >>> weights_digest(nn.Linear(2, 2)) == weights_digest(nn.Linear(2, 2))
        False
    """
    found = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.requires_grad}\n".encode())
        if not isinstance(parameter, DTensor):  # each rank holds another part of those
            bits = parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()])
            found.update(f"{int(bits.sum(dtype=torch.int64))}\n".encode())
    return found.hexdigest()


def _spots(data: Any, rows: Iterable[int]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for row in rows:
        found.update(_text(data[row]).encode())
    return found.hexdigest()


def _text(value: Any) -> str:
    """A value's content, alike for lists, arrays and tensors; what is none of these counts by its type alone."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_text(item)}" for key, item in sorted(value.items(), key=str)) + "}"
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _text(value.tolist())
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    return repr(value) if isinstance(value, (str, bytes, int, float, type(None))) else type(value).__name__
