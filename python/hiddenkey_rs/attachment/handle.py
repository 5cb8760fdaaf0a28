"""Attaching a config to a model, and the handle that stands for it."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ..config import HiddenKeyConfig
from ..errors import ConfigError, DataError, StateError, UnsupportedModelError
from . import hooks, report, two_pass
from .families import family_of
from .implementation import implementations
from .passes import MaskRecorder, StackPass
from .sites import ATTENTION_KINDS, Site, Stack, discover, output_site, plan
from .stock import StockDropout
from .tokens import Tokens, check_sample_ids, from_packed, from_rows

_ATTACHED: WeakValueDictionary[int, Handle] = WeakValueDictionary()
_warned_stock = False


@dataclass(frozen=True)
class ActiveStep:
    """The optimiser step that forward passes belong to, and which branch(es) of it their rows are."""

    step: int
    samples: np.ndarray
    positions: np.ndarray | None = None
    branches: tuple[int, ...] = (0,)
    force: bool = False
    """Draw masks although no gradient is recorded: the second pass of a two-pass loss."""


def attach(
    model: nn.Module, config: HiddenKeyConfig | str | None = None, stock_dropout: str = "keep", impl: str = "auto"
) -> Handle:
    """Attach transformer-specific dropout to a model in training; inference stays the stock model.

    Args:
        model: a transformers ``PreTrainedModel``, or the ``PeftModel`` around one (attach after ``get_peft_model``).
        config: what to drop; a preset's name will do. Default: HiddenKey.
        stock_dropout: ``"keep"`` leaves the model's own dropout on (and warns once: its masks are torch's, not
            reproducible the way these are); ``"off"`` switches it off until :meth:`Handle.detach`, as the paper does.
            ``lora_dropout`` belongs to the adapter and is never touched.
        impl: ``"auto"``, ``"reference"`` or ``"sdpa"``; an explicit choice never falls back.

    Raises:
        UnsupportedModelError: no transformers model, or a family without a place to attach to.
        ConfigError: a config that does not fit the model (layers beyond it, no layer reached).
        StateError: something is attached already.

    Example:
        >>> import torch, transformers, hiddenkey_rs as hk
        >>> shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
        >>> model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape)).train()
        >>> handle = hk.attach(model, hk.HiddenKeyConfig(), stock_dropout="off")
        >>> batch = {"input_ids": torch.ones(4, 6, dtype=torch.long), "labels": torch.tensor([0, 1, 0, 1])}
        >>> with handle.step(0, sample_ids=[7, 8, 9, 10]):
        ...     loss = handle.loss(**batch)
        >>> loss.backward()
        >>> handle.detach()
    """
    if isinstance(config, str):
        config = HiddenKeyConfig.preset(config)
    return Handle(model, config if config is not None else HiddenKeyConfig(), stock_dropout, impl)


class Handle:
    """A config attached to a model: steps, losses, the report, and the way back. Made by :func:`attach`."""

    def __init__(self, model: nn.Module, config: HiddenKeyConfig, stock_dropout: str, impl: str) -> None:
        if not isinstance(config, HiddenKeyConfig):
            raise ConfigError(
                f"config must be a HiddenKeyConfig or a preset's name (got {type(config).__name__}); "
                "see HiddenKeyConfig.preset"
            )
        if impl not in ("auto", "reference", "sdpa"):
            raise ConfigError(f"unknown impl (got {impl!r}); use auto, reference or sdpa")
        self.model, self.config, self.impl = model, config, impl
        self.base = _base_model(model)
        if id(self.base) in _ATTACHED and _ATTACHED[id(self.base)].base is self.base:
            raise StateError(
                f"something is attached to this model already (got {type(self.base).__name__}); "
                "call detach() on the first handle before attaching again"
            )
        family = family_of(self.base.config.model_type, transformers.__version__)
        _check_model(self.base)
        self.stacks = discover(self.base, family)
        self.output = output_site(self.base)
        plan(config, self.stacks, self.output)
        _check_plan(config, self.stacks)
        self.stock = StockDropout(self.base, stock_dropout)
        self._check_consistency()
        self._warn_about_stock()
        self._active: ActiveStep | None = None
        self._last_pass: StackPass | None = None
        self._open_passes: dict[Stack, StackPass | None] = {}
        self._encoder_tokens: Tokens | None = None
        self._features: Tensor | None = None
        self._capture = False
        self._target_mask: Tensor | None = None
        self._recorder: MaskRecorder | None = None
        self._proven = False
        self.last: two_pass.LossOutput | None = None
        self._install()

    # -- life ---------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        self._implementations = implementations(self.base)
        for implementation in self._implementations:
            implementation.attach()
        self._attention = {site.module: site for site in self.sites if site.kind in ATTENTION_KINDS}
        self._removers = hooks.install(self, self.stacks, self.output)
        _ATTACHED[id(self.base)] = self
        self._attached = True

    def detach(self) -> None:
        """Take everything away again; the model is the object that it was before, bit for bit. Harmless twice."""
        if not self._attached:
            return
        for remover in self._removers:
            remover.remove()
        for implementation in self._implementations:
            implementation.detach()
        self.stock.restore()
        _ATTACHED.pop(id(self.base), None)
        self._attached = False

    @property
    def sites(self) -> list[Site]:
        """Every site that the registry found, those that drop nothing included."""
        found = [site for stack in self.stacks for site in stack.sites]
        return found if self.output is None else [*found, self.output]

    @property
    def drops(self) -> bool:
        """Whether any site of this model drops anything."""
        return any(site.drops for site in self.sites)

    # -- steps --------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, step: int, sample_ids: Any, positions: Any = None) -> Iterator[Handle]:
        """The optimiser step that the forward passes inside belong to. ``backward()`` may follow outside.

        Args:
            step: the optimiser step, 0 <= step < 2**32; the same for all micro-batches of an accumulation.
            sample_ids: the examples' ids in the data set, integers in [0, 2**40): shape (batch,), or
                (batch, length) with -1 for padding when rows are packed.
            positions: only for packed rows that hold parts of split documents: each token's position in its
                document, (batch, length).

        Raises:
            DataError: ids missing, of another kind, or out of range.
            StateError: detached, or already inside a step.
        """
        self._require_attached()
        if self._active is not None:
            raise StateError(f"a step is active already (got step {step} inside {self._active.step}); leave it first")
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or not 0 <= step < 1 << 32:
            raise ConfigError(f"step must be an integer in [0, 2**32) (got {step!r}); pass the optimiser step")
        samples = check_sample_ids(sample_ids)
        self._active = ActiveStep(int(step), samples, _check_positions(positions, samples))
        try:
            yield self
        finally:
            self._active = None
            self._last_pass = None

    @contextmanager
    def _branches(self, branches: tuple[int, ...], force: bool = False) -> Iterator[None]:
        before = self._require_step()
        self._active = replace(before, branches=branches, force=force)
        try:
            yield
        finally:
            self._active = before

    def loss(self, **batch: Any) -> Tensor:
        """Task loss plus consistency term of a batch (labels included), a scalar that backward() may follow.

        Runs the passes that the config's consistency asks for. The parts stand in :attr:`last`.
        """
        return self.compute(batch).loss

    def compute(
        self,
        batch: dict[str, Any],
        num_items: Any = None,
        model: nn.Module | None = None,
        task_loss: two_pass.TaskLoss | None = None,
    ) -> two_pass.LossOutput:
        """:meth:`loss` with its parts and the gradient pass's model outputs, for trainers.

        Args:
            batch: the model's keyword arguments, labels included.
            num_items: examples (or target tokens that carry loss) in the whole global batch. Both terms are then
                sums over this batch divided by it, so that accumulation and world size cannot change the gradient;
                by default they are means over this batch.
            model: what to call in place of the attached model, e.g. its DistributedDataParallel wrapper.
            task_loss: function of (outputs, labels) that replaces the model's own loss; a mean over the rows it is given.
        """
        self._require_step()
        self.last = two_pass.compute(self, model if model is not None else self.model, batch, num_items, task_loss)
        return self.last

    def count_items(self, batch: dict[str, Any]) -> Any:
        """How many rows of a batch carry loss: examples, or target tokens that are not masked (-100)."""
        return two_pass.count_items(self, batch)

    @property
    def shifts_labels(self) -> bool:
        """Whether the head predicts the next token, so that labels stand one position ahead of logits."""
        return two_pass.shifts_labels(self)

    # -- passes (called by the hooks) -----------------------------------------------------------------------------

    def _open(self, stack: Stack, inputs: dict[str, Any]) -> StackPass | None:
        """A stack's forward pass begins: the pass to hand down, or ``None`` for the stock model."""
        step = self._new_pass(stack, inputs) if self._wants_masks(stack) else None
        for implementation in self._implementations:
            implementation.begin(step is not None)
        for layer in stack.layers:
            layer.current = None
        self._open_passes[stack] = step
        self._last_pass = step
        return step

    def _close(self, stack: Stack, step: StackPass | None, failed: bool) -> None:
        for implementation in self._implementations:
            implementation.end()
        self._open_passes[stack] = None
        if step is None:
            return
        step.running = False
        if not self._proven and not failed:
            self._prove_reached(stack, step)

    def _running(self, stack: Stack | None) -> StackPass | None:
        return self._open_passes.get(stack) if stack is not None else None

    def _wants_masks(self, stack: Stack) -> bool:
        if not stack.module.training or not self.drops:
            return False
        if self._active is None:
            if torch.is_grad_enabled():
                raise StateError(
                    "a training forward pass ran outside a step, so its sample ids are missing (got no active step); "
                    "wrap it in `with handle.step(step, sample_ids):`"
                )
            return False
        return torch.is_grad_enabled() or self._active.force

    def _new_pass(self, stack: Stack, inputs: dict[str, Any]) -> StackPass:
        active = self._require_step()
        tokens = self._tokens(stack, active, inputs)
        encoder = inputs.get("encoder_hidden_states")
        encoder_tokens = None
        if encoder is not None:
            encoder_tokens = self._encoder_side(active, inputs, encoder)
        return StackPass(
            self.config.seed, active.step, tokens, encoder_tokens, self._attention, self.impl, recorder=self._recorder
        )

    def _encoder_side(self, active: ActiveStep, inputs: dict[str, Any], encoder: Tensor) -> Tokens:
        if active.samples.ndim == 2:
            raise DataError(
                f"rows of an encoder-decoder cannot be packed (got sample ids of shape {active.samples.shape}); "
                "give one sample id a row"
            )
        return from_rows(active.samples, _real(inputs.get("encoder_attention_mask"), encoder), active.branches)

    def _tokens(self, stack: Stack, active: ActiveStep, inputs: dict[str, Any]) -> Tokens:
        ids = inputs.get("input_ids")
        embeds = ids if ids is not None else inputs.get("inputs_embeds")
        if embeds is None:
            raise DataError("the stack received neither input_ids nor inputs_embeds (got None); pass one of them")
        if active.samples.ndim == 2:
            if (
                active.samples.shape[0] * len(active.branches) != embeds.shape[0]
                or active.samples.shape[1] != embeds.shape[1]
            ):
                raise DataError(
                    f"packed sample ids must have the shape of the batch (got {active.samples.shape} for "
                    f"{tuple(embeds.shape[:2])}); give one id a token, -1 at padding"
                )
            return from_packed(active.samples, active.positions, active.branches, embeds.device)
        mask = inputs.get("attention_mask")
        if mask is None and stack.role == "decoder":
            mask = self._target_mask
        return from_rows(active.samples, _real(mask, embeds), active.branches)

    def _prove_reached(self, stack: Stack, step: StackPass) -> None:
        """After the first pass: every site that should drop was called, or the model does not do what it seems to."""
        if getattr(stack.module, "layerdrop", 0):  # LayerDrop may skip any layer of any pass
            return
        missed = [
            site.name
            for site in stack.sites
            if site.drops and site not in step.reached and site.kind != "input" and not _idle_cross(site, step)
        ]
        if missed:
            raise UnsupportedModelError(
                f"{len(missed)} site(s) were never called in the first training pass (got {', '.join(missed[:3])}); "
                "another library has replaced the model's forward code, or the layer does not run"
            )
        self._proven = stack is self.stacks[-1]

    # -- what is known --------------------------------------------------------------------------------------------

    def report(self) -> report.Report:
        """Which layers and sites were found and reached, with configured, realised and measured rates."""
        return report.build(self)

    def realised(self) -> dict[str, float]:
        """Measured rate by site: dropped / allowed since the last :meth:`reset_counts`, after the rescue."""
        return report.realised(self.sites)

    def reset_counts(self) -> None:
        """Start measuring :meth:`realised` anew."""
        for site in self.sites:
            site.counts.clear()

    def record_masks(self, recorder: MaskRecorder | None) -> None:
        """Call ``recorder(mask)`` with every :class:`DrawnMask` of a forward pass (not of replays); ``None`` stops it."""
        self._recorder = recorder

    # -- checks -----------------------------------------------------------------------------------------------------

    def _see_features(self, hidden: Tensor) -> None:
        if self._capture:
            self._features = hidden

    def _require_attached(self) -> None:
        if not self._attached:
            raise StateError("this handle is detached (got a call after detach()); attach again")

    def _require_step(self) -> ActiveStep:
        self._require_attached()
        if self._active is None:
            raise StateError(
                "no step is active, so sample ids are missing (got a loss outside a step); "
                "wrap it in `with handle.step(step, sample_ids):`"
            )
        return self._active

    def _check_consistency(self) -> None:
        part = self.config.consistency
        if part is None:
            return
        if self.base.config.problem_type == "multi_label_classification":
            raise ConfigError(
                "a consistency term compares distributions over classes, and a multi-label head has none "
                "(got problem_type 'multi_label_classification'); set consistency=None"
            )
        adapter_dropout = any("lora_dropout" in name and getattr(m, "p", 0) for name, m in self.model.named_modules())
        if not self.drops and not self.stock.live and not adapter_dropout:
            self.stock.restore()
            raise ConfigError(
                f"the two passes of the consistency term would be identical: nothing is dropped anywhere (got "
                f"consistency kind {part.kind!r}); set a rate, keep the model's own dropout, or set consistency=None"
            )

    def _warn_about_stock(self) -> None:
        global _warned_stock
        if self.stock.live and self.drops and not _warned_stock:
            _warned_stock = True
            warnings.warn(
                f"the model keeps its own dropout in {self.stock.live} place(s); torch draws those masks, so they are not "
                'reproducible the way these are. attach(..., stock_dropout="off") switches them off, as the paper does',
                stacklevel=4,
            )


def _base_model(model: Any) -> Any:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise UnsupportedModelError(
            f"the model is wrapped for data parallelism already (got {type(model).__name__}); attach before wrapping"
        )
    if hasattr(model, "_orig_mod"):
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
    return base


def _check_model(base: transformers.PreTrainedModel) -> None:
    # transformers' own check looks for one spelling of the call; ModernBERT of transformers 5.5 writes brackets.
    code = inspect.getsource(sys.modules[type(base).__module__]) if type(base).__module__ in sys.modules else ""
    if not base._can_set_attn_implementation() and "ALL_ATTENTION_FUNCTIONS[" not in code:
        raise UnsupportedModelError(
            f"the model does not take its attention from transformers' attention interface (got "
            f"{type(base).__name__}, model_type {base.config.model_type!r}); use the library's own model class"
        )
    chunk = getattr(base.config, "chunk_size_feed_forward", 0)
    if chunk:
        raise UnsupportedModelError(
            f"feed-forward chunking runs the FFN several times a layer, so positions are unknown (got "
            f"chunk_size_feed_forward={chunk}); set it to 0"
        )


def _check_plan(config: HiddenKeyConfig, stacks: list[Stack]) -> None:
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


def _idle_cross(site: Site, step: StackPass) -> bool:
    return site.kind == "cross-attention" and step.encoder_tokens is None


def _real(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Which tokens are no padding, (B, L) bool. Without a 2-D mask every token counts as real."""
    if mask is None or mask.dim() != 2:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.shape != tokens.shape[:2]:
        raise DataError(
            f"the attention mask covers other tokens than the batch (got {tuple(mask.shape)} for "
            f"{tuple(tokens.shape[:2])}); train without a cache, one mask entry a token"
        )
    return mask.to(torch.bool)


def _check_positions(positions: Any, samples: np.ndarray) -> np.ndarray | None:
    if positions is None:
        return None
    array = np.asarray(positions.detach().cpu() if isinstance(positions, Tensor) else positions)
    if array.shape != samples.shape or samples.ndim != 2 or array.dtype.kind not in "iu":
        raise DataError(
            f"positions go with packed sample ids, one integer a token (got {array.dtype} of shape {array.shape} for "
            f"sample ids of shape {samples.shape}); leave them out for unpacked rows"
        )
    return array.astype(np.int64)
