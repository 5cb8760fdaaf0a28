"""Whether the steps that ``bench step`` times are right: losses and gradients of a few examples (of compiled ones: all).

Ours must equal the slow reference, checkpointing what it checkpoints, and the ``r-drop`` preset the hand-written loop
under the same torch seed. Torch's dropout has no second implementation: it must drop, and drop anew each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import devices
from .step_models import DOUBLED, NONE, Runner, Variant, base_model

_EXAMPLES = 2
_MOST_LAYERS, _FEW_LAYERS = 12, 4
"""Deeper models are compared cut to a few layers: through 32 of them the rounding of bfloat16 alone exceeds any tolerance."""
_STEP = 5
_TOLERANCES = {"float32": 1e-4, "bfloat16": 6e-2}
"""Of the norm of all gradients together: other orders of summation; in bfloat16 the weights of attention are rounded."""

Found = tuple[Tensor, dict[str, Tensor]]


def passing(runners: Mapping[Variant, Runner], base: nn.Module, device: str) -> set[Variant]:
    """The variants whose step is right; what went wrong with others goes to standard error."""
    found = set()
    shape = next(iter(runners.values())).shape
    if shape.layers > _MOST_LAYERS:
        shape = replace(shape, layers=_FEW_LAYERS)
        base = base_model(shape, device)
        runners = {variant: Runner(shape, variant, base, device) for variant in runners}
    for variant, runner in runners.items():
        try:
            reason = _fault(variant, runner, runners, base, device)
        except Exception as error:  # whatever a step raises, the other variants still count
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            found.add(variant)
        else:
            devices.say(f"check failed: {runner.shape.label}, {variant.name}: {reason}")
    return found


def _fault(
    variant: Variant, runner: Runner, runners: Mapping[Variant, Runner], base: nn.Module, device: str
) -> str | None:
    """What is wrong with a variant's step; ``None`` = nothing."""
    # A graph of other rows than those that are timed would be compiled for nothing, and make the next one of any number.
    examples = runner.shape.batch if variant.compiled else _EXAMPLES
    loss, gradients = found = _seeded(runner, examples)
    if not gradients or not all(bool(g.isfinite().all()) for g in (loss, *gradients.values())):
        return "its gradients are not finite"
    if variant.stock or variant.adapter:
        again = _seeded(runner, examples, seed=1)[1]  # of 16 bits a loss may well be the same, but not all gradients
        if all(torch.equal(again[name], gradients[name]) for name in gradients):
            return "it drops nothing"
        other = DOUBLED if variant.preset == "r-drop" else None
    else:
        impl = "reference" if variant.preset else "auto"
        other = replace(variant, checkpointing=False, compiled=False, graphs=False, impl=impl)
    if other is None or (other == variant == NONE):
        return _undropped(runner, loss) if variant == NONE else None
    second = runners.get(other) if variant.preset is None or other == DOUBLED else None
    if second is None:
        second = Runner(runner.shape, other, base, device)
        if second.handle is not None:
            second.handle.record_masks(lambda mask: None)  # HiddenCut then goes through a mask, as the definition does
    expected = _seeded(second, examples)
    if not same(found, expected, _TOLERANCES[runner.shape.dtype]):
        return f"its loss or gradients differ from those of {'the reference' if other.preset else other.name}"
    return None


def _seeded(runner: Runner, examples: int, seed: int = 0) -> Found:
    """Loss and gradients of a few examples, and the consistency term among them, which is small in the loss."""
    torch.manual_seed(seed)
    loss, gradients = runner.gradients(_STEP, examples)
    last = runner.handle.last if runner.handle is not None else None
    if last is not None and last.consistency is not None and not runner.variant.stock:
        gradients["consistency"] = last.consistency.float()
    return loss, gradients


def _undropped(runner: Runner, loss: Tensor) -> str | None:
    """In training the undropped step must be what it is in evaluation."""
    runner.model.eval()
    with torch.no_grad():
        expected = runner.loss(_STEP, _EXAMPLES).float()
    runner.model.train()
    close = bool((loss - expected).abs() <= _TOLERANCES[runner.shape.dtype] * expected.abs())
    return None if close else "its loss in training is not that in evaluation"


def same(found: Found, expected: Found, tolerance: float) -> bool:
    """Whether losses, and every weight's gradient, agree to a share of the norm of all gradients of its kind."""
    if found[1].keys() != expected[1].keys():
        return False
    if not bool((found[0] - expected[0]).abs() <= tolerance * expected[0].abs().clamp(min=1e-3)):
        return False
    parts = [(found[1][name] - expected[1][name], expected[1][name]) for name in expected[1] if name != "consistency"]
    error, size = (torch.stack([part[n].norm() for part in parts]).norm() for n in (0, 1))
    close = bool(error <= tolerance * size)
    if "consistency" in expected[1]:
        mine, other = found[1]["consistency"], expected[1]["consistency"]
        # A divergence is a difference of logarithms that nearly cancel: its rounding is of the logits' size squared.
        close &= bool((mine - other).abs() <= 30 * tolerance * other.abs() + 1e-7)
    return close
