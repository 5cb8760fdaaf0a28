"""How the Triton kernels are launched: what they can take, tile sizes, and arguments that several of them share."""

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
_NOTHING, _ELEMENT, _KEYS, _KEPT = 0, 1, 2, 3


def widest_head(states: Tensor) -> int:
    """The widest heads of this dtype and device whose tiles fit into shared memory."""
    if states.dtype != torch.float32:
        return 256
    return 128 if _shared_memory(states.device) >= HOPPER else 64


def on_cuda(device: torch.device) -> bool:
    """Whether this is a device that the kernels are made for, and Triton is there: NVIDIA's from Ampere on."""
    return device.type == "cuda" and _installed() and torch.version.hip is None and _capability(device) >= 8


def unable(states: Tensor) -> str | None:
    """Why Triton cannot work on this tensor at all: not installed, another device, another dtype."""
    if not _installed():
        return "Triton is not installed"
    if states.device.type == "cuda" and torch.version.hip is not None:
        return "its kernels hold instructions of NVIDIA's devices"
    if states.device.type == "cuda" and _capability(states.device) < 8:
        return "its kernels are made for NVIDIA's devices from Ampere on, compute capability 8.0"
    if states.dtype not in DTYPES:
        return f"it computes in float16, bfloat16 and float32, not {states.dtype}"
    if states.device.type != "cuda" and not (states.device.type == "cpu" and _interpreted()):
        return f"it needs tensors on a CUDA device, not {states.device} (or TRITON_INTERPRET=1)"
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
    """What the three kernels are all launched with."""

    def __init__(
        self,
        kind: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor,
        keys: Tensor | None,
        keep: Tensor | None,
        longest: int,
        mask_heads: int,
        causal: bool,
        shifted: bool = False,
        lists: Tensor | None = None,
    ) -> None:
        heads, groups = query.shape[1], key.shape[1]
        head, head_v = query.shape[-1], value.shape[-1]
        pattern = _KEPT if lists is not None else _KEYS if keep is not None else _NOTHING if keys is None else _ELEMENT
        rows, columns, warps, stages = tiles(
            kind, max(head, head_v), query.dtype, _shared_memory(query.device), pattern == _ELEMENT, causal
        )
        # Element masks are drawn 128 columns at a time, for one tile or two.
        span = max(columns, 128) if pattern == _ELEMENT else columns
        # A document whose first key stands inside a tile of positions can touch one more; tiles of a list cannot.
        beyond = (span - 1) * (shifted and pattern != _KEPT)
        blocks = _blocks(longest, rows) if kind != "key" else _blocks(longest + beyond, span) * (span // columns)
        owners = mask_heads if pattern == _KEPT else groups
        self.programs = blocks * len(table) * (owners if kind == "key" else heads)
        # Tensors that a launch has no use for: any pointer does.
        self.tensors = (
            table.contiguous(),
            table if keys is None else keys.contiguous(),
            table if keep is None else keep.contiguous().view(torch.uint8) if lists is None else lists,
        )
        each = len(table) if keys is None else len(table) // len(keys)
        self.numbers = (
            heads,
            query.shape[2],
            heads // groups,
            heads // mask_heads,
            mask_heads,
            0 if keep is None else keep.shape[2] if lists is None else lists.shape[3],
            each,
            blocks,
        )
        self.constants = {
            "HEAD": head,
            "HEAD_V": head_v,
            "BLOCK_D": _power(head),
            "BLOCK_V": _power(head_v),
            "ROWS": rows,
            "COLUMNS": columns,
            "PATTERN": pattern,
            "PRECISION": _precision(query),
            "num_warps": warps,
            # Products and sums become one instruction, which Triton 3.10 must be asked for.
            "enable_fp_fusion": True,
            # One stage more, where there are two, for the positions that rows are loaded by: half a KiB.
            "num_stages": stages + (pattern == _KEPT and kind != "key" and stages > 1),
        }
        self.device: Any = device_of(query)


def device_of(states: Tensor) -> Any:
    """A context to launch in: Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(states.device) if states.device.type == "cuda" else nullcontext()


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
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block of this device can have."""
    if device.type != "cuda":
        return HOPPER
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def _precision(states: Tensor) -> str:
    """How float32 is multiplied; other dtypes do not read it."""
    if states.device.type == "cpu":
        return "interpreter"
    backend = torch.backends.cuda.matmul
    setting = getattr(backend, "fp32_precision", None)  # torch >= 2.9
    fast = backend.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if fast else "tf32x3"


def strides(*tensors: Tensor) -> list[int]:
    """The strides of all but the last dimension (which is 1) of four-dimensional tensors, one after the other."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def _power(head: int) -> int:
    """The width of a tensor-core operand that holds a head."""
    return max(16, 1 << (head - 1).bit_length())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _interpreted() -> bool:
    return bool(kernels("philox").interpreted())


def kernels(name: str) -> Any:
    """Kernels are imported at first use: Triton takes long to import, and TRITON_INTERPRET is read then."""
    return importlib.import_module(f".triton_{name}", __package__)
