"""How the Triton kernels are launched: what they can take, tile sizes, and launches that are made ready once."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HOPPER = 227 << 10
"""Bytes of shared memory that a block of an H100 can have."""
_ALIGNED = 16
"""Bytes: whether pointers are multiples of so many is compiled in."""
_MOST_READY = 2048


def widest_head(states: Tensor) -> int:
    """The widest heads of this dtype and device whose tiles fit into shared memory."""
    return _widest(states.dtype, states.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _widest(dtype: torch.dtype, device: torch.device) -> int:
    if dtype != torch.float32:
        return 256
    return 128 if shared_memory(device) >= HOPPER else 64


def on_cuda(device: torch.device) -> bool:
    """Whether this is a device that the kernels are made for, and Triton is there: NVIDIA's from Ampere on."""
    return device.type == "cuda" and _installed() and torch.version.hip is None and _capability(device) >= 8


def unable(states: Tensor) -> str | None:
    """Why Triton cannot work on this tensor at all: not installed, another device, another dtype."""
    if torch.compiler.is_compiling():
        return _unable(states.dtype, states.device)
    kind = (states.dtype, states.device)
    return _UNABLE[kind] if kind in _UNABLE else _UNABLE.setdefault(kind, _unable(*kind))


_UNABLE: dict[tuple[torch.dtype, torch.device], str | None] = {}
"""What :func:`unable` has said: every layer asks."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _unable(dtype: torch.dtype, device: torch.device) -> str | None:
    if not _installed():
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip is not None:
        return "its kernels hold instructions of NVIDIA's devices"
    if device.type == "cuda" and _capability(device) < 8:
        return "its kernels are made for NVIDIA's devices from Ampere on, compute capability 8.0"
    if dtype not in DTYPES:
        return f"it computes in float16, bfloat16 and float32, not {dtype}"
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"it needs tensors on a CUDA device, not {device} (or TRITON_INTERPRET=1)"
    return None


def unwatched(states: Tensor) -> bool:
    """Whether nobody compiles, traces or watches operators, which is what going through torch's dispatcher is for.

    Eager training goes past it: a custom operator costs the host 100 us forward and backward, as much as a small layer.
    """
    return (
        type(states) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class Launch:
    """A kernel, and what a launch of it takes beside tensors: made once for tensors of one geometry, launched often.

    Triton binds every launch's arguments anew and looks up what it has compiled for such: with fifty arguments the host needs
    longer for that than for all of a small layer. The second launch on, as long as pointers are aligned as most are, calls
    what the first one compiled: numbers and constants are the same ones, and pointers say nothing else that is compiled in.
    """

    def __init__(
        self, kernel: Any, programs: int, numbers: tuple[Any, ...], constants: dict[str, Any], device: torch.device
    ) -> None:
        """``numbers``: the arguments behind the pointers. ``constants``: the constexpr ones, and Triton's own options."""
        self.kernel, self.programs, self.numbers, self.constants = kernel, programs, numbers, constants
        self._device = device
        self._again: Any = None
        self._arguments: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        """Launch, on the current stream of the tensors' device."""
        if not self.programs:
            return
        pointers = [tensor.data_ptr() for tensor in tensors]
        every = 0
        for pointer in pointers:
            every |= pointer
        aligned = not every % _ALIGNED
        if self._again is not None and aligned and _is_current(self._device):
            self._again(*pointers, *self._arguments)
            return
        views = [tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in tensors]
        with device_of(self._device):
            compiled = self.kernel[(self.programs,)](*views, *self.numbers, **self.constants)
        if aligned and kernels("philox").runs_again(compiled):
            constants = (self.constants[name] for name in self.kernel.arg_names if name in self.constants)
            self._arguments = (*self.numbers, *constants)
            self._again = compiled[(self.programs, 1, 1)]


class Ready(dict[Any, Any]):
    """What was made for a geometry, by what tells geometries apart; emptied when many have been seen, as of many lengths."""

    def keep(self, key: Any, made: Any) -> Any:
        """Keep, and return, ``made``."""
        if len(self) >= _MOST_READY:
            self.clear()
        self[key] = made
        return made


def device_of(device: torch.device) -> Any:
    """A context to launch in: Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.current_device() == device.index


def tiles(
    kind: str, head: int, dtype: torch.dtype, shared: int = HOPPER, drawn: bool = False, causal: bool = False
) -> tuple[int, int, int, int]:
    """Rows, columns, warps and pipeline stages of ``"forward"``, ``"query"`` and ``"key"`` (gradients) kernels.

    Args:
        head: the wider of the two head sizes. shared: bytes of shared memory a block can have.
        drawn: whether elements are drawn: by 64 columns or 128. causal: whether queries see different keys.

    For Hopper in 16 bits measured on an H100 (``benches/results/tiles_h100.jsonl``); else chosen by what the compiler makes
    of them for sm_90 and sm_89 (registers, spills, shared memory). Eight warps divide 128 rows among them: of 64, each half
    of them would compute all.
    """
    if dtype == torch.float32:
        if shared < HOPPER:
            return 32, 64, 4, 1
        if head > 64:
            return 32, 64, 8, 1
        if drawn or kind == "query":
            return 64, 64, 4, 1
        return (128, 64, 8, 1) if kind == "forward" else (64, 32, 4, 1)
    if shared < HOPPER:
        if head > 128:
            return 16, 64, 4, 1
        if kind == "forward":
            return 128, 64, 8, 2
        return (64 if kind == "query" or head <= 64 else 32), 64, 4, 2
    if head > 128:
        return 128, 64, 8, 2 if kind == "forward" else 1
    if drawn and head <= 64:
        return {"forward": (64, 128, 4, 2), "query": (64, 64, 4, 2), "key": (128, 64, 4, 2)}[kind]
    if drawn:
        return 64, 64, 4, 3 if kind == "forward" else 2
    if kind == "forward" and head > 64:
        return (128, 32, 4, 3) if causal else (128, 128, 8, 2)
    if kind == "forward":
        return 128, 64, 4, 4
    return (64, 128, 4, 2) if kind == "query" and head <= 64 and not causal else (64, 64, 4, 2)


@cache
def _capability(device: torch.device) -> int:
    return int(torch.cuda.get_device_capability(device)[0])


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of this device can have."""
    if device.type != "cuda":
        return HOPPER
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def precision(states: Tensor) -> str:
    """How float32 is multiplied; other dtypes do not read it."""
    if states.device.type == "cpu":
        return "interpreter"
    if states.dtype != torch.float32:
        return "tf32x3"
    backend = torch.backends.cuda.matmul
    setting = getattr(backend, "fp32_precision", None)  # torch >= 2.9
    fast = backend.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if fast else "tf32x3"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _interpreted() -> bool:
    return bool(kernels("philox").interpreted())


def kernels(name: str) -> Any:
    """Kernels are imported at first use: Triton takes long to import, and TRITON_INTERPRET is read then."""
    return importlib.import_module(f".triton_{name}", __package__)
