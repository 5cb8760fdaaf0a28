"""Where a training step's time goes, by torch's profiler: attention, FFN, adapters, masks, HiddenCut, heads, optimiser.

Modules and functions are marked while they run forward; an operator of the backward pass belongs where the forward
operator does that it differentiates (autograd's sequence numbers say which).
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from statistics import median
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from . import devices
from .step_models import Runner, Variant

_MARK = "part: "
_SECOND, _REST, _OUTSIDE = "second pass", "norms, residuals, embeddings", "autograd, Python between operators"
# Module names -> part; the first that matches, and the innermost module, win.
_MODULES = (
    (r"\.base_layer$|attention\.output\.dense$|[ko]_proj$|attention\.self\.key$", "attention projections"),
    (r"lora_|attention\.self\.(query|value)$|[qv]_proj$", "adapters"),
    (r"attention(\.self)?$|self_attn$", "attention"),
    (r"(intermediate|output)(\.dense)?$|mlp$", "FFN"),
    (r"(classifier|score|lm_head|pooler)", "loss head"),
    (r"^base_model$", "loss head"),  # peft calls the model's forward itself, past the hooks of base_model.model
    (r"^base_model\.model\.(bert|model)$", _REST),
    (r"(LayerNorm|norm|embeddings|embed_tokens)$", _REST),
)
# Functions of the library that are marked if they are there: (module, class or "", name) -> part.
_FUNCTIONS = {
    ("attachment.session", "Session", "open"): "masks and plan",
    ("attachment.session", "Session", "close"): "masks and plan",
    ("attachment.interface", "", "hiddenkey_mask"): "masks and plan",
    ("attachment.interface", "", "attention_keep"): "masks and plan",
    ("ops", "", "kept_set"): "masks and plan",
    ("ops.reference", "", "kept_set"): "masks and plan",
    ("ops.api", "", "count_pairs"): "masks and plan",
    ("attachment.hooks", "", "_cut"): "HiddenCut",
    ("attachment.two_pass", "", "_second_pass"): _SECOND,
    ("attachment.two_pass", "", "token_losses"): "loss head",
    ("attachment.head", "_Pieces", "other_logits"): _SECOND,
    ("attachment.terms", "", "_other"): "consistency",
    ("attachment.terms", "", "_term"): "consistency",
    ("attachment.two_pass", "", "compared_rows"): "consistency",
    ("losses", "", "consistency"): "consistency",
    ("losses", "", "reduce"): "consistency",
}
_ORDER = (
    "attention",
    "attention projections",
    "adapters",
    "FFN",
    _REST,
    "loss head",
    "masks and plan",
    "HiddenCut",
    "consistency",
    _SECOND,
    "optimiser",
    _OUTSIDE,
)
_STEPS = 3

Parts = list[tuple[str, dict[str, str]]]


def profile(runners: Mapping[Variant, Runner], device: str) -> Parts:
    """Part -> variant's name -> milliseconds as text, the median of a few steps; the last line is their sum.

    On an accelerator the device's, and behind them the host's, which small models wait for.
    """
    steps = {variant.name: [_one(runner, device) for _ in range(_STEPS)] for variant, runner in runners.items()}
    lines = []
    for head in _measures(device):
        parts = {
            name: {part: median(step[head].get(part, 0.0) for step in found) for part in _ORDER}
            for name, found in steps.items()
        }
        lines += [(head + part, {name: f"{times[part]:.1f}" for name, times in parts.items()}) for part in _ORDER]
        lines.append((f"{head}all of them", {name: f"{sum(times.values()):.1f}" for name, times in parts.items()}))
    return lines


def _measures(device: str) -> dict[str, str]:
    """Before a part's name -> which of an event's times."""
    host = "self_cpu_time_total"
    return {"": host} if device == "cpu" else {"": "self_device_time_total", "host, ": host}


def _one(runner: Runner, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of one step by measure and part."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device != "cpu" else [])
    with _marked(runner.model), _muted(), torch_profile(activities=activities, acc_events=True) as recorded:
        with record_function(_MARK + _OUTSIDE):
            runner.loss(runner.steps).backward()
            with record_function(_MARK + "optimiser"):
                runner.update()
            devices.wait(device)
        runner.steps += 1
    events = recorded.events() or []
    return {head: attribute(events, measure) for head, measure in _measures(device).items()}


def attribute(events: Any, measure: str) -> dict[str, float]:
    """Milliseconds by part: each event's own time goes to the innermost mark around it or around its forward operator."""
    forward: dict[int, tuple[float, str]] = {}
    for event in events:
        part, backward = _part(event)
        if backward is None and part is not None and event.sequence_nr >= 0:
            # Operators that make no node see the next one's number too: the last to see it made the node.
            forward[event.sequence_nr] = max(forward.get(event.sequence_nr, (-1.0, "")), (event.time_range.start, part))
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        part, backward = _part(event)
        if backward is not None:
            part = forward.get(backward, (0.0, _OUTSIDE))[1]
        totals[part or _OUTSIDE] += getattr(event, measure) / 1e3
    return dict(totals)


def _part(event: Any) -> tuple[str | None, int | None]:
    """The innermost mark around an event (the second pass's, if it is in one), or the number of its forward operator."""
    found, at = None, event
    while at is not None:
        if at.name.startswith("autograd::engine::evaluate_function") and at.sequence_nr >= 0:
            return found, None if found is not None else at.sequence_nr
        if at.name.startswith(_MARK):
            name = at.name.removeprefix(_MARK)
            if name == _SECOND:
                return name, None
            found = found or name
        at = at.cpu_parent
    return found, None


@contextmanager
def _muted() -> Iterator[None]:
    """While this lasts, nothing reaches standard error: the profiler writes there, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """While this lasts, parts of the model and of the library say what they are to the profiler."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            part = next((part for pattern, part in _MODULES if re.search(pattern, name)), None)
            if part is not None:
                stack.enter_context(_hooked(module, part))
        for (path, owner, name), part in _FUNCTIONS.items():
            holder: Any = import_module(f"..{path}", __package__)
            holder = getattr(holder, owner, None) if owner else holder
            real = getattr(holder, name, None)
            if real is not None:
                stack.enter_context(patch.object(holder, name, _recorded(real, part)))
        yield


@contextmanager
def _hooked(module: nn.Module, part: str) -> Iterator[None]:
    open_marks: list[Any] = []

    def before(module: nn.Module, args: Any) -> None:
        open_marks.append(record_function(_MARK + part))
        open_marks[-1].__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    removers = [
        module.register_forward_pre_hook(before, prepend=True),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for remover in removers:
            remover.remove()


def _recorded(real: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + part):
            return real(*args, **kwargs)

    return call
