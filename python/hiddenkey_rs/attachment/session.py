"""The active step of an attached model, and the passes that its forward passes open and close."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError, DataError, StateError, UnsupportedModelError
from ..plan import PlanEntry, StepPlan
from .compared import is_for
from .implementation import Implementation
from .inputs import check_told_apart, lets_documents_mix, real_tokens, stack_inputs
from .interface import maskless_graphs
from .passes import MaskRecorder, Pass, StackPass
from .prepared import CALLED, PreparedPass, called_with, slots_of
from .sites import Site, Stack
from .tokens import RowFacts, Tokens, from_packed, from_rows

_DIRECT = (
    "a compiled model cannot lay out its masks by itself (got a direct call in training); "
    "call handle.loss(**batch) or handle.compute(batch)"
)


@dataclass(frozen=True)
class ActiveStep:
    """The optimiser step that forward passes belong to, and which branch(es) of it their rows are."""

    step: int
    samples: np.ndarray
    positions: np.ndarray | None = None
    branches: tuple[int, ...] = (0,)
    force: bool = False
    """Draw masks although no gradient is recorded: for a loss of training, and its second pass."""

    idle: bool = field(init=False)
    """Whether there are rows and all of them are padding: the model runs as it is, and nothing of it counts."""

    def __post_init__(self) -> None:
        # A number, not a property: a compiled graph may ask for it, and cannot look into an array.
        object.__setattr__(self, "idle", bool(self.samples.size) and int(self.samples.max()) < 0)


class Session:
    """What the hooks of one attached model share while it trains."""

    def __init__(
        self,
        seed: int,
        stacks: list[Stack],
        attention: Mapping[nn.Module, Site],
        implementations: list[Implementation],
        impl: str,
        drops: bool,
        model: nn.Module,
        output: Site | None,
        guided: bool,
        choices: bool,
    ) -> None:
        self.seed, self.stacks, self.attention, self.impl, self.drops = seed, stacks, attention, impl, drops
        self.implementations, self.output = implementations, output
        self.guided = guided
        """Whether a HiddenCut span asks for the attention weights."""
        self.choices = choices
        """Whether an example is several rows, the choices that its head compares."""
        # Weakly: the hooks hold the session, so it would keep its model until the cycle collector comes by.
        self._model = ref(model)
        self.active: ActiveStep | None = None
        self.last_pass: Pass | None = None
        """The pass of the stack that ran last; the head behind it belongs to it."""
        self.recorder: MaskRecorder | None = None
        self.target_mask: Tensor | None = None
        """Real tokens of an encoder-decoder's targets, where the batch brings no mask for them."""
        self.capture = False
        self.features: Tensor | None = None
        """What the head received, where ``capture`` asks for it."""
        self.head_receives: list[Tensor] | None = None
        """Where a vocabulary head leaves what it received instead of making logits of it."""
        self._running: list[Pass | None] = [None] * len(stacks)
        self._prepared = False
        """Whether the compiled model is being called, with passes that were laid out for it."""
        self._counters: dict[int, Tensor] = {}
        self.left: dict[int, Any] = {}
        """By stack, what the layers that both passes share made in the gradient pass."""
        self.handed: dict[int, Any] = {}
        """By stack, what those of a compiled model hand on in the next pass."""
        self._proven = self._apart = False
        self._seen: list[tuple[Any, int, RowFacts]] = []
        """Masks of the active step's calls, and what their rows are like."""
        self.attached = False
        self.handle: Callable[[], Any] = _nothing
        """Gives the handle, if anybody keeps it."""
        self.undo: Callable[[], None] = _nothing
        """Takes everything away again; here, as the hooks keep a session alive, and nobody may keep the handle."""
        self.of_trainer = False
        """Whether a Trainer attached it, which the next Trainer of the model may undo."""

    @contextmanager
    def step(self, active: ActiveStep) -> Iterator[None]:
        """Forward passes inside belong to this step."""
        if self.active is not None:
            raise StateError(
                f"a step is active already (got step {active.step} inside {self.active.step}); leave it first"
            )
        self.active = active
        try:
            yield
        finally:
            self.active = None
            self._seen = []
            self.last_pass = None

    @contextmanager
    def branches(self, branches: tuple[int, ...], force: bool = False) -> Iterator[None]:
        """Forward passes inside are of these branches; ``force`` draws masks without gradient too."""
        before = self.require_step()
        self.active = replace(before, branches=branches, force=force)
        try:
            yield
        finally:
            self.active = before

    def require_step(self) -> ActiveStep:
        """The active step, or a :class:`StateError`."""
        if self.active is None:
            raise StateError(
                "no step is active, so sample ids are missing (got a loss outside a step); "
                "wrap it in `with handle.step(step, sample_ids):`"
            )
        return self.active

    def running(self, number: int) -> Pass | None:
        """The pass of the stack of this number, if its forward pass is under way."""
        return self._running[number]

    def check_outside(self, module: nn.Module) -> None:
        """Raise for a layer that should drop and runs outside its stack's forward pass, whose hooks tell it what."""
        site = self.attention.get(module)
        replayed = torch._C._current_graph_task_id() != -1  # in backward, of a pass without dropout
        if site is None or site.stack is None or replayed or not module.training or not self._wants_masks(site.stack):
            return
        raise UnsupportedModelError(
            f"a layer ran without the call of the stack that holds it, so its dropout is unknown (got {site.name!r} outside "
            f"{type(site.stack.module).__name__}'s own call); call that module and not its layers or its forward (as peft before "
            "0.21 and AdaLoRA do with a model that has no head)"
        )

    def see_features(self, hidden: Tensor) -> None:
        """The head received ``hidden``."""
        if self.capture:
            self.features = hidden

    def new_pass(self, stack: Stack, inputs: dict[str, Any]) -> StackPass | None:
        """The pass that a stack's forward pass begins with, or ``None`` for the stock model."""
        if not self._wants_masks(stack):
            return None
        model = self._model()
        if model is not None and model._compiled_call_impl is not None:  # a graph that broke calls its parts one by one
            refuse(_DIRECT)
        return self._lay_out(stack, inputs)

    def prepared_pass(self, number: int) -> PreparedPass | None:
        """The pass that was laid out for the stack of this number before the model was called."""
        return CALLED[number] if self._prepared else None

    def open(self, stack: Stack, number: int, stack_pass: Pass | None) -> None:
        """A stack's forward pass begins with ``stack_pass``, or as the stock model's."""
        compiling = torch.compiler.is_compiling()
        if compiling and stack_pass is None and self._wants_masks(stack):
            refuse(_DIRECT)
        # What replays need to find is of no use to a graph, and would make it depend on the step.
        if stack_pass is None or not compiling:
            kernels = stack_pass is not None and stack_pass.kernels
            packed = self._apart and isinstance(stack_pass, StackPass) and stack_pass.tokens.packed
            for implementation in self.implementations:
                implementation.begin(stack_pass is not None, kernels, packed)
        if not compiling:
            for layer in stack.layers:
                layer.current = None
        self._running[number] = stack_pass
        self.last_pass = stack_pass

    def close(self, stack: Stack, number: int, stack_pass: Pass | None, failed: bool) -> None:
        """A stack's forward pass is over (``failed``: by an exception)."""
        if stack_pass is None or not torch.compiler.is_compiling():
            for implementation in self.implementations:
                implementation.end()
        self._running[number] = None
        if not isinstance(stack_pass, StackPass):
            return
        stack_pass.running = False
        self._apart = self._apart or stack_pass.apart
        if not self._proven and not failed:
            self._prove_reached(stack, stack_pass.reached, stack_pass.encoder_tokens is None)

    @contextmanager
    def prepared(self, batch: dict[str, Any], compiled: bool) -> Iterator[None]:
        """A call of the model inside, if it is ``compiled``, takes its masks from passes that are laid out here.

        Args:
            batch: what the model is called with.
            compiled: whether calling it runs compiled code; otherwise nothing happens here.
        """
        wanting = [compiled and self._wants_masks(stack) for stack in self.stacks]
        if not any(wanting):
            yield
            return
        if self.recorder is not None:
            raise StateError(
                "a compiled model does not show its masks (got a recorder); record them before compiling: "
                "they are the same"
            )
        numbers = range(len(self.stacks))
        passes = [self._prepare(number, batch) if wanting[number] else None for number in numbers]
        failed = True
        try:
            maskless = all(part.kernels for part in passes if part is not None)
            with called_with(passes), maskless_graphs(maskless, batch.get("position_ids") is None):
                self._prepared = True
                yield
            failed = False
        finally:
            self._prepared = False
            for number, stack_pass in enumerate(passes):
                if stack_pass is not None:
                    self._finish(number, stack_pass, failed)

    def _prepare(self, number: int, batch: dict[str, Any]) -> PreparedPass:
        stack = self.stacks[number]
        if self.choices:  # as the model lays them out
            laid = {
                name: value.flatten(0, 1)
                for name, value in batch.items()
                if isinstance(value, Tensor) and value.dim() > 2
            }
            batch = batch | laid
        classes = is_for("SequenceClassification", self._model() or stack.module)
        stack_pass = self._lay_out(stack, stack_inputs(stack, batch, beside=len(self.stacks) > 1, by_token=not classes))
        if stack_pass.suspect:
            check_told_apart(stack, stack_pass, batch)
        sites = self._counted(stack)
        slots = slots_of(sites)
        counter = self._counters.get(number)
        if counter is None or counter.device != stack_pass.tokens.document.device:
            counter = torch.zeros(len(slots), 3, dtype=torch.int64, device=stack_pass.tokens.document.device)
            torch._dynamo.mark_static_address(counter)  # or a CUDA graph could not change it in place
            self._counters[number] = counter
        prepared = PreparedPass(stack_pass, slots, sites, counter)
        prepared.handed = self.handed.get(number)
        return prepared

    def _finish(self, number: int, stack_pass: PreparedPass, failed: bool) -> None:
        stack = self.stacks[number]
        sites = self._counted(stack)
        totals = stack_pass.finish(sites)
        self.left[number], stack_pass.left, stack_pass.handed = stack_pass.left, None, None
        if not self._proven and not failed:
            called = totals[:, 2].tolist()
            reached = {s for s in sites if any(called[stack_pass.slots[s.kind, depth]] for depth in s.drops)}
            self._prove_reached(stack, reached, stack_pass.encoder_tokens is None)

    def _counted(self, stack: Stack) -> list[Site]:
        """The sites that drop in a stack's pass, and the one in front of the head, which the last stack's pass serves."""
        sites = [site for site in stack.sites if site.drops]
        if self.output is not None and self.output.drops and stack is self.stacks[-1]:
            sites.append(self.output)
        return sites

    def _wants_masks(self, stack: Stack) -> bool:
        if not stack.module.training or not self.drops:
            return False
        if self.active is None:
            if torch.is_grad_enabled():
                refuse(
                    "a training forward pass ran outside a step, so its sample ids are missing (got no active step); "
                    "wrap it in `with handle.step(step, sample_ids):`"
                )
            return False
        return (torch.is_grad_enabled() or self.active.force) and not self.active.idle

    def _lay_out(self, stack: Stack, inputs: dict[str, Any]) -> StackPass:
        active = self.require_step()
        tokens = self._tokens(stack, active, inputs)
        encoder = inputs.get("encoder_hidden_states")
        encoder_tokens = None
        if encoder is not None:
            encoder_tokens = self._encoder_side(active, inputs, encoder)
        mask = inputs.get("attention_mask")
        self._check_kernels(stack, tokens, mask)
        stack_pass = StackPass(
            self.seed,
            active.step,
            tokens,
            encoder_tokens,
            self.attention,
            self.impl,
            kernels=self._by_kernels(stack, tokens, mask),
            recorder=self.recorder,
            plans=(
                self._plan(stack.entries[0], active, tokens),
                self._plan(stack.entries[1] if encoder_tokens is not None else (), active, encoder_tokens or tokens),
            ),
            dropping=self._counted(stack),
        )
        stack_pass.suspect = self._suspect(stack, tokens, mask)
        return stack_pass

    def _by_kernels(self, stack: Stack, tokens: Tokens, mask: Tensor | None) -> bool:
        if self.impl != "auto":
            return self.impl == "triton"
        # Whoever records masks, or asks for weights, needs what kernels never make.
        fits = not self.guided and self.recorder is None and not (tokens.crowded and lets_documents_mix(stack, mask))
        # Kernels give padding zeros, and the stock model a mixture of real tokens: which an encoder's head reads where
        # padding stands in front.
        fits = fits and (stack.role == "decoder" or tokens.aligned or tokens.packed)
        return fits and ops.triton_launch.on_cuda(tokens.document.device)

    def _check_kernels(self, stack: Stack, tokens: Tokens, mask: Tensor | None) -> None:
        if self.impl == "triton" and tokens.crowded and lets_documents_mix(stack, mask):
            raise ConfigError(
                "a 2-D mask beside packed rows asks for documents that see each other, which Triton's kernels keep apart "
                "(got impl='triton'); leave the mask out and give position_ids that restart, or use impl='auto'"
            )

    def _suspect(self, stack: Stack, tokens: Tokens, mask: Tensor | None) -> bool:
        """Whether a pass must still show that the documents of a row do not attend to each other."""
        if self._apart or self.impl == "triton" or not tokens.crowded:
            return False
        return not lets_documents_mix(stack, mask)

    def _plan(self, entries: tuple[PlanEntry, ...], active: ActiveStep, tokens: Tokens) -> StepPlan:
        """Every column and span mask of a pass in one call, so that no layer waits for one."""
        documents = (tokens.samples, tokens.branches, tokens.lengths, tokens.columns)
        return StepPlan(self.seed, active.step, entries, *documents)

    def _encoder_side(self, active: ActiveStep, inputs: dict[str, Any], encoder: Tensor) -> Tokens:
        if active.samples.ndim == 2:
            raise DataError(
                f"rows of an encoder-decoder cannot be packed (got sample ids of shape {active.samples.shape}); "
                "give one sample id a row"
            )
        return from_rows(active.samples, self._facts(inputs.get("encoder_attention_mask"), encoder), active.branches)

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
            mask = self.target_mask
        samples = active.samples
        if self.choices:
            samples = np.repeat(samples, max(embeds.shape[0] // max(len(samples) * len(active.branches), 1), 1))
        return from_rows(samples, self._facts(mask, embeds), active.branches)

    def _facts(self, mask: Any, tokens: Tensor) -> RowFacts:
        """What the batch's rows are like. Both passes of a step are given one mask: it is looked at once."""
        # A mask may be written to; those of inference mode do not tell, and are looked at every time.
        version = mask._version if isinstance(mask, Tensor) and not mask.is_inference() else None
        for seen, at, facts in self._seen:
            if seen is mask and at == version and facts.real.shape == tokens.shape[:2]:
                return facts
        real = real_tokens(mask, tokens)
        if real is None:
            return RowFacts.whole(tokens.shape[0], tokens.shape[1], tokens.device)
        facts = RowFacts.of(real, told=True)
        if version is not None:
            self._seen.append((mask, version, facts))
        return facts

    def _prove_reached(self, stack: Stack, reached: set[Site], alone: bool) -> None:
        """After the first pass: every site that should drop was called, or the model does not do what it seems to."""
        if getattr(stack.module, "layerdrop", 0):  # LayerDrop may skip any layer of any pass
            return
        missed = [
            site.name
            for site in stack.sites
            if site.drops
            and site.module.training
            and site not in reached
            and site.kind != "input"
            and not (alone and site.crosses)
        ]
        if missed:
            raise UnsupportedModelError(
                f"{len(missed)} site(s) were never called in the first training pass (got {', '.join(missed[:3])}); "
                "another library has replaced the model's forward code, or the layer does not run"
            )
        self._proven = stack is self.stacks[-1]


def _nothing() -> None:
    """Until something is attached."""


def refuse(message: str) -> NoReturn:
    """A :class:`StateError`, or its text in the error that torch.compile makes of one."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=message)
    raise StateError(message)
