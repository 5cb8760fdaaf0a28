"""torch's attention kernel for the CPU, called on parts of an attention: what :mod:`.compact` and :mod:`.blocked` share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_on(query: Tensor) -> bool:
    """Whether the kernel takes this tensor: on the CPU, in one of :data:`DTYPES`."""
    return query.device.type == "cpu" and query.dtype in DTYPES


def check_types(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises ConfigError unless keys and values are of the queries' type and device: the kernel itself looks at neither."""
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        found = ", ".join(f"{rows.dtype} on {rows.device}" for rows in (query, key, value))
        raise ConfigError(f"queries, keys and values are of different types or devices (got {found}); cast them to one")


def readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with features side by side: the kernel believes that they are, and SDPA's own check is not in its way here."""
    return tuple(rows if rows.stride(-1) == 1 else rows.contiguous() for rows in tensors)


def empty(query: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the output, (B, H, Q, D) with heads inside as transformers wants them, and for the denominators."""
    batch, heads, length, features = query.shape
    out = query.new_empty((batch, length, heads, features)).transpose(1, 2)
    return out, query.new_zeros((batch, length, heads), dtype=torch.float32).transpose(1, 2)


def like(rows: Tensor) -> Tensor:
    """Memory for (B, H, K, D) with heads inside."""
    return torch.empty_like(rows.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def forbid(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a mask is True, else -inf: what the kernel takes for a mask."""
    return torch.zeros((), dtype=dtype).masked_fill(~mask, -torch.inf)


def bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The numbers of a contiguous tensor as unsigned integers of their width: NumPy has no bfloat16."""
    if tensor.element_size() == 2:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.view(torch.int32).numpy().view(np.uint32)
