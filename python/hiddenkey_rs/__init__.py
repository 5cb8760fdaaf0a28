"""Transformer-specific dropout for LoRA fine-tuning: DropKey, DropAttention, HiddenCut and HiddenKey.

Implements "LoRA Meets Dropout under a Unified Framework" (arXiv 2403.00812). Names load at first use, so
that ``import hiddenkey_rs`` and the mask functions cost a NumPy user nothing more than NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import losses, masks, ops
    from .attachment import DrawnMask, Handle, LossOutput, attach, detach
    from .batches.pack import Packing, pack
    from .config import (
        PRESETS,
        AttentionDrop,
        Consistency,
        ElementDrop,
        HiddenDrop,
        HiddenKeyConfig,
    )
    from .errors import ConfigError, DataError, HiddenKeyError, StateError, UnsupportedModelError
    from .loading.collator import Collator
    from .loading.loader import build_dataloader
    from .loading.packed import PackedStore
    from .loading.planned import PlanSpec
    from .loading.sampler import BatchSampler
    from .loading.store import TokenStore
    from .masks import BitMask, MaskKey, get_num_threads, set_num_threads
    from .plan import StepPlan, plan_step
    from .train import HiddenKeyTrainer, HiddenKeyTrainerMixin, Loader
    from .train.sft import HiddenKeySFTTrainer as HiddenKeySFTTrainer

_MODULE_OF = {
    **dict.fromkeys(["attach", "detach", "DrawnMask", "Handle", "LossOutput"], "attachment"),
    **dict.fromkeys(
        ["PRESETS", "AttentionDrop", "Consistency", "ElementDrop", "HiddenDrop", "HiddenKeyConfig"], "config"
    ),
    **dict.fromkeys(["ConfigError", "DataError", "HiddenKeyError", "StateError", "UnsupportedModelError"], "errors"),
    **dict.fromkeys(["Packing", "pack"], "batches.pack"),
    "BatchSampler": "loading.sampler",
    "Collator": "loading.collator",
    "PackedStore": "loading.packed",
    "PlanSpec": "loading.planned",
    "build_dataloader": "loading.loader",
    "TokenStore": "loading.store",
    **dict.fromkeys(["BitMask", "MaskKey", "get_num_threads", "set_num_threads"], "masks"),
    **dict.fromkeys(["StepPlan", "plan_step"], "plan"),
    **dict.fromkeys(["HiddenKeyTrainer", "HiddenKeyTrainerMixin", "Loader"], "train"),
    "HiddenKeySFTTrainer": "train.sft",
}
_SUBMODULES = ("losses", "masks", "ops")

# Without HiddenKeySFTTrainer, which needs TRL: ``from hiddenkey_rs import *`` is for everybody.
__all__ = [
    "PRESETS",
    "AttentionDrop",
    "BatchSampler",
    "BitMask",
    "Collator",
    "ConfigError",
    "Consistency",
    "DataError",
    "DrawnMask",
    "ElementDrop",
    "Handle",
    "HiddenDrop",
    "HiddenKeyConfig",
    "HiddenKeyError",
    "HiddenKeyTrainer",
    "HiddenKeyTrainerMixin",
    "Loader",
    "LossOutput",
    "MaskKey",
    "PackedStore",
    "Packing",
    "PlanSpec",
    "StateError",
    "StepPlan",
    "TokenStore",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "build_dataloader",
    "detach",
    "get_num_threads",
    "losses",
    "masks",
    "ops",
    "pack",
    "plan_step",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hiddenkey_rs")
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULE_OF})
