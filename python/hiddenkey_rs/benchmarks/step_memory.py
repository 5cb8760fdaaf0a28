"""Peak memory of a training step, variant by variant.

On the host the peak is a process's, so each variant gets a process of its own, forked from a server that has only
imported what they need: growth from before the model exists to the highest point of a few steps. Large tensors are mapped
on their own there: glibc's heap keeps holes between blocks, by chance and for every variant, up to half as much again as
is ever in use, and what a step needs would drown in them. On a device it is what torch's allocator counted.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn

from ..experiments.models import quiet_libraries
from . import devices, machine
from .step_models import Runner, Shape, Variant, base_model

_STEPS = 3


def on_cpu(shape: Shape, variants: Sequence[Variant], threads: int) -> dict[Variant, float]:
    """Variant -> MiB, of those that ran to the end."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload([Runner.__module__])
    found = {}
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for variant in variants:
            try:
                found[variant] = pool.submit(_grown, shape, variant, threads).result()
            except Exception as error:  # the time of the variant still counts
                devices.say(f"peak memory of {variant.name}: {type(error).__name__}: {error}")
    return found


def on_device(runners: Mapping[Variant, Runner], base: nn.Module) -> dict[Variant, float]:
    """Variant -> MiB: the frozen weights, and what the second step holds beyond what all runners hold anyway."""
    weights = sum(part.nbytes for part in base.parameters())
    found = {}
    for variant, runner in runners.items():
        runner.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        runner.step()
        torch.cuda.synchronize()
        found[variant] = (weights + torch.cuda.max_memory_allocated() - before) / (1 << 20)
    return found


def exact(size: float) -> dict[str, Any]:
    """One figure as a summary."""
    return {"median": size, "p10": size, "p90": size, "n": 1}


def _grown(shape: Shape, variant: Variant, threads: int) -> float:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it talks of kernels it lacks
    quiet_libraries()
    machine.set_threads(threads)
    _map_large_blocks()
    before = _resident()
    runner = Runner(shape, variant, base_model(shape, "cpu"), "cpu")
    for _ in range(_STEPS):
        runner.step()
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1 << 10)
    return (peak - before) / (1 << 20)


def _map_large_blocks() -> None:
    """Let glibc give every block of a MiB or more pages of its own, and take them back at once."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD; set by hand, it no longer grows with what is freed


def _resident() -> int:
    """Bytes that this process has in memory now; where the system does not tell, its peak so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1 << 10)
