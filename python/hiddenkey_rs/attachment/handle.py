"""Attaching a config to a model, and the handle that stands for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..config import HiddenKeyConfig
from ..errors import ConfigError, StateError, shown
from ..serialise import choice
from . import compared, hooks, report, two_pass
from .checks import CompiledParts, base_model, check_model, check_plan, check_wrapper, warn_about_ranks
from .families import family_of
from .head import head_of
from .implementation import Implementation, implementations
from .kernels import check_kernels
from .passes import MaskRecorder
from .session import ActiveStep, Session
from .sharing import Sharing
from .sites import ATTENTION_KINDS, Site, discover, output_site, plan
from .stock import StockDropout, adapters_draw
from .tokens import check_positions, check_sample_ids
from .wiring import Wiring

# Models by identity, held weakly: the hooks stay on a model whether or not anybody keeps its handle, and an id() may
# come back for another model while a dead one's hooks still wait for the cycle collector.
_ATTACHED: WeakKeyDictionary[nn.Module, ReferenceType[Session]] = WeakKeyDictionary()
_warned_stock = False


def attach(
    model: nn.Module, config: HiddenKeyConfig | str | None = None, stock_dropout: str = "keep", impl: str = "auto"
) -> Handle:
    """Attach transformer-specific dropout to a model in training; inference stays the stock model.

    Args:
        model: a transformers ``PreTrainedModel``, or the ``PeftModel`` around one (attach after ``get_peft_model``).
        config: what to drop; a preset's name will do. Default: HiddenKey.
        stock_dropout: ``"keep"`` leaves the model's own dropout on (and warns once: its masks are torch's, not
            reproducible the way these are); ``"off"`` switches it off until :meth:`Handle.detach`, as the paper does.
            An adapter's own (``lora_dropout``) is never touched.
        impl: who computes dropped attention: ``"auto"``, ``"reference"``, ``"sdpa"``, ``"compact"``,
            ``"blocked"`` (CPU; :func:`hiddenkey_rs.ops.dropped_attention` has what each can do) or ``"triton"`` (CUDA; HiddenCut
            too); an explicit choice never falls back. ``"auto"`` takes Triton's kernels on CUDA wherever they can compute what
            the model asks for.

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


def detach(model: nn.Module) -> None:
    """What :meth:`Handle.detach` does, for a model whose handle nobody kept. Harmless where nothing is attached.

    Example:
        >>> import transformers, hiddenkey_rs as hk
        >>> shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
        >>> model = transformers.BertModel(transformers.BertConfig(**shape))
        >>> _ = hk.attach(model, stock_dropout="off")
        >>> hk.detach(model)
        >>> hk.attach(model, "dropkey-span", stock_dropout="off").detach()
    """
    session = attached_session(model)
    if session is not None:
        session.undo()


def attached_session(model: Any) -> Session | None:
    """The session of what is attached to a model, or to the one inside its wrappers (peft's, torch.compile's, DDP's)."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner = inner.module
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    found = _ATTACHED.get(base) if isinstance(base, nn.Module) else None
    return None if found is None else found()


def _undo(
    session: Session,
    removers: list[RemovableHandle],
    sharing: Sharing,
    stock: StockDropout,
    base: ReferenceType[nn.Module],
) -> None:
    if not session.attached:
        return
    for remover in removers:
        remover.remove()
    for implementation in session.implementations:
        implementation.detach()
    sharing.detach()
    stock.restore()
    session.attached = False
    model = base()
    if model is not None:
        _ATTACHED.pop(model, None)


class Handle:
    """A config attached to a model: steps, losses, the report, and the way back. Made by :func:`attach`.

    Attributes:
        model: what was attached to. base: the transformers model inside it.
        config: what is dropped. impl: who computes attention.
        last: the numbers of the last :meth:`loss` or :meth:`compute`, a :class:`~hiddenkey_rs.LossOutput` without graph and
            outputs; ``None`` before.

    Example:
        >>> import torch, transformers
        >>> import hiddenkey_rs as hk
        >>> shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        >>> bert = transformers.BertConfig(vocab_size=50, **shape)
        >>> model = transformers.BertForSequenceClassification(bert).train()
        >>> handle = hk.attach(model, "hiddenkey", stock_dropout="off")
        >>> with handle.step(0, sample_ids=[4, 9]):
        ...     loss = handle.loss(input_ids=torch.ones(2, 8, dtype=torch.int64), labels=torch.tensor([0, 1]))
        >>> loss.backward()
        >>> sorted(handle.realised())
        ['attention', 'ffn']
        >>> handle.detach()
    """

    def __init__(self, model: nn.Module, config: HiddenKeyConfig, stock_dropout: str, impl: str) -> None:
        if not isinstance(config, HiddenKeyConfig):
            raise ConfigError(
                f"config must be a HiddenKeyConfig or a preset's name (got {type(config).__name__}); "
                "see HiddenKeyConfig.preset"
            )
        choice(impl, ops.IMPLEMENTATIONS, "impl")
        self.model, self.config, self.impl = model, config, impl
        self.base = base_model(model)
        if self.base in _ATTACHED:
            raise StateError(
                f"something is attached to this model already (got {type(self.base).__name__}); "
                "call detach() on the first handle (a Trainer's is trainer.handle), or hiddenkey_rs.detach(model)"
            )
        family = family_of(self.base.config.model_type, transformers.__version__)
        check_model(self.base)
        if impl == "triton":
            check_kernels(self.base, config)
        self.stacks = discover(self.base, family)
        self.output = output_site(self.base)
        plan(config, self.stacks, self.output)
        check_plan(config, self.stacks)
        compared.check_classes(self)
        self.head = head_of(self)
        self._wiring = self._wires()
        found = implementations(self.base)
        self.stock = StockDropout(self.base, stock_dropout)
        self._check_consistency()
        self._warn_about_stock()
        self.last: two_pass.LossOutput | None = None
        self.compiled_parts = CompiledParts()
        self._install(found)

    # -- life ---------------------------------------------------------------------------------------------------

    def _install(self, found: list[Implementation]) -> None:
        for implementation in found:
            implementation.attach()
        attention = {site.module: site for site in self.sites if site.kind in ATTENTION_KINDS}
        self.session = Session(
            self.config.seed,
            self.stacks,
            attention,
            found,
            self.impl,
            self.drops,
            self.model,
            self.output,
            guided=self.config.hidden is not None and self.config.hidden.start == "attention",
            choices=compared.is_for("MultipleChoice", self.base),
        )
        for implementation in found:
            implementation.session = ref(self.session)
        self.sharing = Sharing(self)
        removers = hooks.install(self.session, self.stacks, self.output, self.head)
        self.session.undo = partial(_undo, self.session, removers, self.sharing, self.stock, ref(self.base))
        self.session.attached, self.session.handle = True, ref(self)
        _ATTACHED[self.base] = ref(self.session)

    def _wires(self) -> Wiring:
        """The ways to every module that drops, or hands over what is compared."""
        compares = compared.compares_features(self)
        dropping = [site for site in self.sites if site.drops or (compares and site is self.output)]
        head = [] if self.head is None else [name for name, m in self.base.named_modules() if m is self.head.module]
        attended = [site.name for site in self.sites if site.kind in ATTENTION_KINDS]
        cut = [site.name for site in dropping if site.kind == "ffn"]
        return Wiring(self.base, [*(site.name for site in dropping), *head], attended, cut)

    def put_back(self) -> None:
        """Attach again what was taken away: for who took it away too early."""
        if self.stock.off:
            self.stock = StockDropout(self.base, "off")
        session = self.session
        self._install(implementations(self.base))
        self.session.of_trainer, self.session.recorder = session.of_trainer, session.recorder

    def detach(self) -> None:
        """Take everything away again; the model is the object that it was before, bit for bit. Harmless twice.

        Not between a loss and its ``backward()`` where activations are checkpointed: layers run again in there.
        """
        self.session.undo()

    @property
    def sites(self) -> list[Site]:
        """Every site that the registry found, those that drop nothing included."""
        found = [site for stack in self.stacks for site in stack.sites]
        return found if self.output is None else [*found, self.output]

    @property
    def drops(self) -> bool:
        """Whether any site of this model drops anything."""
        return any(site.drops for site in self.sites)

    @property
    def adapter_dropout(self) -> bool:
        """Whether an adapter of the model drops something by itself, such as peft's ``lora_dropout``."""
        return adapters_draw(self.model)

    # -- steps --------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, step: int, sample_ids: Any, positions: Any = None) -> Iterator[Handle]:
        """The optimiser step that the forward passes inside belong to. ``backward()`` may follow outside.

        Args:
            step: the optimiser step, 0 <= step < 2**32; the same for all micro-batches of an accumulation.
            sample_ids: the examples' ids in the data set, integers in [0, 2**40): shape (batch,), or
                (batch, length) with -1 for padding when rows are packed. A single -1 is a padding row, for a rank that
                has none of a step's rows: its passes run, its losses and rates have weight zero. Under a
                multiple-choice head an example's choices have its one id, and drop the same.
            positions: only for packed rows that hold parts of split documents: each token's position in its
                document, (batch, length).

        Raises:
            ConfigError: ``step`` outside [0, 2**32).
            DataError: ids missing, of another kind, or out of range.
            StateError: detached, already inside a step, or a module that drops was replaced.
        """
        self._require_attached()
        self._wiring.check(self.base)
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or not 0 <= step < 1 << 32:
            raise ConfigError(f"step must be an integer in [0, 2**32) (got {shown(step)}); pass the optimiser step")
        samples = check_sample_ids(sample_ids)
        with self.session.step(ActiveStep(int(step), samples, check_positions(positions, samples))):
            yield self

    def loss(self, **batch: Any) -> Tensor:
        """Task loss plus consistency term of a batch (labels included), a scalar that backward() may follow.

        Runs the passes that the config's consistency asks for, of the attached model itself: under DistributedDataParallel it
        takes ``compute(batch, model=wrapper).loss``. The parts stand in :attr:`last`. Under ``torch.no_grad()`` it is
        the loss of training all the same, with dropout; a direct call of the model is the stock model's there.

        Raises:
            DataError: no labels, or rows that are not those of the step.
            StateError: detached, or outside a step.
            ConfigError: a head that the consistency term has no meaning for.
            UnsupportedModelError: attention that the first pass shows to be none of those that can be dropped from.
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
                sums over this batch divided by it, so that accumulation and world size cannot change the gradient
                (a wrapper that averages gradients over ranks divides by their number: multiply the loss by it);
                by default they are means over this batch.
            model: what to call in place of the attached model: its DistributedDataParallel wrapper, which else would not
                see the pass, and not average its gradients.
            task_loss: function of (outputs, labels) that replaces the model's own loss; a mean over the rows it is given.
                Of question answering, labels are where answers start and end, (batch, 2).

        Raises:
            What :meth:`loss` raises; UnsupportedModelError: a ``model`` that runs copies of the attached one
            (DataParallel), or that flattens its weights (FSDP's first version).
        """
        self._require_attached()
        self.session.require_step()
        self.last = None  # whatever comes of this one
        check_wrapper(model)
        if model is None:
            warn_about_ranks(self.model)
        found = two_pass.compute(self, model if model is not None else self.model, batch, num_items, task_loss)
        # Not the graph: after an error in backward it would hold on to the activations.
        self.last = replace(found, loss=found.loss.detach(), outputs=None)
        return found

    def count_items(self, batch: dict[str, Any]) -> Any:
        """How many rows of a batch carry loss: examples, target tokens that are not masked (-100), or starts and ends.

        A padding row, known by ``batch["sample_id"]``, carries none.
        """
        return compared.count_items(self, batch)

    @property
    def shifts_labels(self) -> bool:
        """Whether the head predicts the next token, so that labels stand one position ahead of logits."""
        return compared.shifts_labels(self)

    # -- what is known --------------------------------------------------------------------------------------------

    def report(self) -> report.Report:
        """Which layers and sites were found and reached, with configured, realised and measured rates."""
        return report.build(self)

    def realised(self) -> dict[str, float]:
        """Measured rate by site: dropped / allowed since the last :meth:`reset_counts`, after the rescue."""
        return report.realised(self.sites)

    def counted(self) -> dict[str, tuple[int, int]]:
        """(dropped, allowed) by site since the last :meth:`reset_counts`: what :meth:`realised` divides."""
        return report.counted(self.sites)

    def reset_counts(self) -> None:
        """Start measuring :meth:`realised` anew."""
        for site in self.sites:
            site.counts.clear()

    def record_masks(self, recorder: MaskRecorder | None) -> None:
        """Call ``recorder(mask)`` with every :class:`DrawnMask` of a forward pass (not of replays); ``None`` stops it."""
        self.session.recorder = recorder

    # -- checks -----------------------------------------------------------------------------------------------------

    def _require_attached(self) -> None:
        if not self.session.attached:
            raise StateError(
                "this handle is detached (got a call after detach(), or another Trainer took the model); attach again"
            )

    def _check_consistency(self) -> None:
        part = self.config.consistency
        if part is None:
            return
        if not self.drops and not self.stock.live and not self.adapter_dropout:
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
