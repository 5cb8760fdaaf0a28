"""Where a benchmark's tensors live: the host or a CUDA device."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError
from ..experiments.provenance import PACKAGES
from . import machine

NAMES = ("cpu", "cuda")


def check(name: str) -> str:
    """``name``, if it can be used here.

    Raises:
        ConfigError: ``cuda`` on a machine without it.

    Example:
        >>> check("cpu")
        'cpu'
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this machine has no CUDA device that torch can use (got --device cuda); use --device cpu")
    return name


def wait(device: str) -> None:
    """Until the device has done what it was given; the host works at once."""
    if device != "cpu":
        torch.cuda.synchronize()


def place(about: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What rows say about where they were measured, the device and its libraries included."""
    versions = dict(machine.versions((*PACKAGES, "transformers", "peft", "triton")))
    if device != "cpu":
        versions |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return {**about, "device": device, "versions": versions}


def say(text: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
