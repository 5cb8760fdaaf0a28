"""Dropout of other kinds, to compare with: the model's own, and on the rank axis of adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError


def set_stock_rate(model: nn.Module, rate: float) -> int:
    """Give every ``nn.Dropout`` of a model without adapters this rate; returns how many there are.

    A model made without dropout (LLaMA) has none, and a control that controls nothing is an error.
    """
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if not found:
        raise ConfigError(
            f"the model has no dropout of its own (got {type(model).__name__}); leave the control stock_rate out"
        )
    for module in found:
        module.p = rate
    return len(found)


def drop_ranks(model: Any, rate: float) -> int:
    """Dropout on the rank axis of every LoRA adapter, after DropLoRA: one draw a forward pass, shared by all its rows.

    Returns how many adapters drop. Only in training; torch's generator draws.
    """

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return output * F.dropout(output.new_ones(output.shape[-1]), rate) if module.training else output

    found = [module for name, module in model.named_modules() if name.endswith("lora_A.default")]
    if not found:
        raise ConfigError(f"there are no LoRA adapters to drop ranks of (got {type(model).__name__}); add LoRA first")
    for module in found:
        module.register_forward_hook(drop)
    return len(found)
