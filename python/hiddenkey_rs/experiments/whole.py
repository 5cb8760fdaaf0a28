"""The trained weights of a model that may be spread over ranks (FSDP2), whole, and back into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .models import restore_adapter


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The trained weights by name, on the CPU, for ``save_pretrained``; ``None`` if they are whole already.

    Every rank must come here: weights are gathered.
    """
    if not _spread(model):
        return None
    # The copy is what waits for a gathered tensor: on CPUs it arrives later.
    return {_plain(name): _full(p).cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore_weights(model: nn.Module, folder: Path) -> None:
    """Put a saved adapter's weights back into the peft model that they were saved from."""
    if not _spread(model):
        restore_adapter(model, folder)
        return
    import peft
    from torch.distributed.tensor import distribute_tensor

    saved: Mapping[str, Tensor] = peft.load_peft_weights(str(folder), device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                whole: Any = saved[_saved_name(name)].to(parameter.device, parameter.dtype)
                parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))  # type: ignore[attr-defined]


def _saved_name(name: str) -> str:
    """What peft calls it in a file: without the adapter's name, and without the place of a module that is trained whole."""
    return _plain(name).replace(".modules_to_save.default", "").replace(".default", "")


def _plain(name: str) -> str:
    return name.replace("._checkpoint_wrapped_module", "")


def _spread(model: nn.Module) -> bool:
    """Whether weights are spread; then no unit keeps them whole, as some do after a forward pass."""
    units: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.reshard()
    return bool(units)


def _full(parameter: Any) -> Tensor:
    return parameter.detach().full_tensor()
