"""What a model and a config must be before anything is attached: checked first, so that a refusal leaves no trace."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from ..config import HiddenKeyConfig
from ..errors import ConfigError, UnsupportedModelError
from .sites import ATTENTION_KINDS, Stack

_BY_TOKEN = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS")
"""Tasks of peft whose labels stand beside tokens."""
_warned_ranks = False


def base_model(model: Any) -> Any:
    """The transformers model itself, out of its peft wrapper."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise UnsupportedModelError(
            f"the model is wrapped for data parallelism already (got {type(model).__name__}); attach before wrapping"
        )
    if isinstance(model, nn.Module) and on_compiled(model):
        raise UnsupportedModelError(
            f"the model is compiled already, and hooks added now would be ignored (got {type(model).__name__}); "
            "attach first, then compile"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, transformers.PreTrainedModel):
        raise UnsupportedModelError(
            f"only transformers models can be attached to (got {type(model).__name__}); "
            "pass a PreTrainedModel or the PeftModel around one"
        )
    _check_prompts(model)
    return base


def _check_prompts(model: Any) -> None:
    adapter: Any = getattr(model, "active_peft_config", None)
    if adapter is None or not getattr(adapter, "is_prompt_learning", False):
        return
    kind, task = (str(getattr(value, "value", value)) for value in (adapter.peft_type, adapter.task_type))
    if kind == "PREFIX_TUNING" or task in _BY_TOKEN:
        raise UnsupportedModelError(
            f"prompt learning puts tokens before every row that belong to no example (got {type(adapter).__name__} for "
            f"{task}); use an adapter inside the layers, such as LoraConfig"
        )


def check_wrapper(model: nn.Module | None) -> None:
    """What a loop calls in the attached model's place runs the attached modules, and leaves their weights what they are."""
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(
            f"replicas of a model have no dropout attached (got {type(model).__name__}); train in one process a device, "
            "with torchrun and DistributedDataParallel"
        )
    if isinstance(model, FullyShardedDataParallel):
        raise UnsupportedModelError(
            f"FSDP's first version flattens the model's weights (got {type(model).__name__}); shard it with "
            "torch.distributed.fsdp.fully_shard"
        )


def warn_about_ranks(model: nn.Module) -> None:
    """Once: what runs past a DistributedDataParallel wrapper has gradients that nobody averages. No error: a loop may do it."""
    global _warned_ranks
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if known else 1
    if ranks == 1 or _warned_ranks or not torch.is_grad_enabled():
        return
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        _warned_ranks = True
        warnings.warn(
            f"the loss runs the attached model itself on each of {ranks} ranks, past any DistributedDataParallel around it, "
            "whose gradients are then not averaged; use handle.compute(batch, model=WRAPPER), or model=handle.model to average "
            "them yourself",
            stacklevel=4,
        )


def on_compiled(model: nn.Module) -> bool:
    """Whether calling the model runs compiled code: its own, or that of a module inside."""
    return CompiledParts().anywhere(model)


class CompiledParts:
    """:func:`on_compiled` for who asks in every step: a walk through all modules costs as much as one of a model's layers."""

    def __init__(self) -> None:
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._modules: list[nn.Module] = []
        self._held: list[tuple[Mapping[str, Any], list[Any]]] = []
        self._wrapped = False

    def anywhere(self, model: nn.Module) -> bool:
        """Whether calling the model runs compiled code."""
        if self._model() is not model or any(list(now.values()) != before for now, before in self._held):
            self._walk(model)
        return self._wrapped or any(part._compiled_call_impl is not None for part in (model, *self._modules))

    def _walk(self, model: nn.Module) -> None:
        found = [model]
        for module in found:
            found.extend(child for child in module._modules.values() if child is not None)
        self._model, self._modules = ref(model), found[1:]  # not the model itself: its own handle may hold this
        self._held = [(module._modules, list(module._modules.values())) for module in found]
        # What torch.compile returns keeps the module under this name; nn.Module.compile works in place.
        self._wrapped = any("_orig_mod" in module._modules for module in found)


def check_model(base: transformers.PreTrainedModel) -> None:
    """The model takes its attention from the interface, and runs each FFN once a layer."""
    if not _asks_interface(type(base)):
        raise UnsupportedModelError(
            f"the model does not take its attention from transformers' attention interface (got "
            f"{type(base).__name__}, model_type {base.config.model_type!r}); use the library's own model class"
        )
    if base.config.model_type == "gpt2" and base.config.add_cross_attention:
        raise UnsupportedModelError(
            "GPT-2 hands no keyword arguments to its cross-attention, so its dropout cannot reach it (got "
            "add_cross_attention=True); use another decoder, such as BART's or BERT's"
        )
    placed = (getattr(base, "hf_device_map", None) or {}).values()
    devices = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in placed}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model is spread over devices, and masks lie on one (got {', '.join(sorted(devices))} in its device_map); "
            'load it whole, with device_map={"": local_rank}, and train in one process a device'
        )
    chunk = getattr(base.config, "chunk_size_feed_forward", 0)
    if chunk:
        raise UnsupportedModelError(
            f"feed-forward chunking runs the FFN several times a layer, so positions are unknown (got "
            f"chunk_size_feed_forward={chunk}); set it to 0"
        )


def _asks_interface(kind: type[transformers.PreTrainedModel]) -> bool:
    """Whether a class takes its attention from the interface: judged by the library's class behind a user's own."""
    library: Any = next((k for k in kind.__mro__ if k.__module__.startswith("transformers.models.")), kind)
    if library._can_set_attn_implementation():
        return True
    try:  # transformers' own check looks for one spelling of the call; ModernBERT of transformers 5.5 writes brackets
        return "ALL_ATTENTION_FUNCTIONS[" in inspect.getsource(sys.modules[library.__module__])
    except (KeyError, OSError, TypeError):  # no source is at hand
        return False


def check_plan(config: HiddenKeyConfig, stacks: list[Stack]) -> None:
    """What the config wants to drop is dropped somewhere."""
    attention = [site for stack in stacks for site in stack.sites if site.kind in ATTENTION_KINDS]
    if not attention:
        raise UnsupportedModelError(
            "no attention layer was found (got 0 sites); the model's code differs from the family's"
        )
    wanted = any(part is not None and part.rate > 0 for part in (config.attention, config.hidden))
    reached = any(site.drops for stack in stacks for site in stack.sites if site.kind != "input")
    if wanted and not reached:
        raise ConfigError(
            f"the config reaches no layer of this model (got layers={config.layers!r} and "
            f"{sum(stack.depths for stack in stacks)} layer(s)); set layers='all' or name a layer"
        )
