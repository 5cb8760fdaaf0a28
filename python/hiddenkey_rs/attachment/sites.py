"""The places of a model where something can be dropped, and what the config asks of each.

Discovery walks the model once at attach time, by the family registry and by names: module attributes such as
``layer_idx`` are missing in some families and shared between self- and cross-attention in others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..config import RATE_LEVELS, HiddenKeyConfig, matches, rate_for, resolve_layers, threshold
from ..errors import ConfigError, UnsupportedModelError
from ..plan import PlanEntry, plannable
from .counts import Tally
from .families import Family, StackSpec

if TYPE_CHECKING:
    from .passes import Pass

ATTENTION_KINDS = ("attention", "cross-attention")
_HEADS = ("classifier", "score", "classification_head", "qa_outputs")


@dataclass(frozen=True)
class SiteDrop:
    """What one site drops in one layer."""

    position: str
    pattern: str
    rate: float
    heads: str = "group"
    rescale: bool = False
    start: str = "uniform"

    @property
    def threshold(self) -> int:
        """The 16-bit integer that a lane must reach to be kept."""
        return threshold(self.rate)

    @property
    def realised(self) -> float:
        """The probability of dropping that the threshold realises."""
        return self.threshold / RATE_LEVELS

    @property
    def scale(self) -> float:
        """What kept values are multiplied with: 1 / (1 - realised) where the site rescales."""
        return 1.0 / (1.0 - self.realised) if self.rescale else 1.0


@dataclass(eq=False)
class Layer:
    """A layer module and the pass that its attention saw last.

    FFN hooks receive no keyword arguments; they run right after their layer's attention, in the forward pass and
    in a checkpoint's replay alike, and so read the pass (and, for shared modules, the depth) from here.
    """

    index: int
    name: str
    current: Pass | None = None
    depth: int = 0
    received: Tensor | None = None
    """Attention received by each key, (batch, keys) float32; only filled where ``guided``."""
    guided: bool = False
    """Whether an attention-guided HiddenCut span in this layer wants ``received``."""


@dataclass(eq=False)
class Site:
    """One module at which something may be dropped, and its plan: depth -> :class:`SiteDrop`."""

    kind: str
    site: str
    name: str
    module: nn.Module
    layer: Layer
    stack: Stack | None
    drops: dict[int, SiteDrop] = field(default_factory=dict)
    calls: int = 0
    counts: dict[int, Tally] = field(default_factory=dict)

    @property
    def crosses(self) -> bool:
        """Whether its columns are the encoder's tokens."""
        return self.kind == "cross-attention"

    @property
    def side(self) -> int:
        """:attr:`crosses` as a place in a pair of plans. A number: torch 2.11's graphs index by no bool."""
        return 1 if self.crosses else 0

    def count(self, depth: int, kept: Tensor, possible: Tensor | int) -> None:
        """So many of the pairs or places that could be dropped were kept; see :class:`.Tally`."""
        self.counts.setdefault(depth, Tally()).add(kept, possible)


@dataclass(eq=False)
class Stack:
    """One stack of the model with its sites. ``name`` is canonical: no peft prefix, empty for the root."""

    module: nn.Module
    name: str
    role: str
    spec: StackSpec
    depths: int
    sites: list[Site] = field(default_factory=list)
    layer_modules: list[nn.Module] = field(default_factory=list)
    groups: list[nn.Module] = field(default_factory=list)
    inner: int = 1
    entries: tuple[tuple[PlanEntry, ...], tuple[PlanEntry, ...]] = ((), ())
    """What a step plans ahead: sites over the stack's own tokens, and over the encoder's (cross-attention)."""

    @property
    def layers(self) -> Iterator[Layer]:
        """The layers that carry sites, each once."""
        seen: set[int] = set()
        for site in self.sites:
            if id(site.layer) not in seen:
                seen.add(id(site.layer))
                yield site.layer


def discover(model: nn.Module, family: Family) -> list[Stack]:
    """Every stack of ``model`` with its attention, cross-attention, FFN and input sites."""
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        for spec in family.stacks:
            if _fits(module, spec, family):
                stacks.append(_stack(module, name, spec, family))
                break
    if not stacks:
        wanted = ", ".join(dict.fromkeys(spec.module_class for spec in family.stacks))
        raise UnsupportedModelError(
            f"the model holds no stack of layers of its family (got {type(model).__name__}, model_type "
            f"{family.model_type!r}, looked for {wanted}); attach to a transformers model of that family"
        )
    return stacks


def output_site(model: Any) -> Site | None:
    """The site in front of the classifier or language-modelling head, if the model has one."""
    for name in _HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            return Site("output", "output", name, head, Layer(0, name), None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if head is not None and module is head:
            return Site("output", "output", name, module, Layer(0, name), None)
    return None


def plan(config: HiddenKeyConfig, stacks: list[Stack], output: Site | None) -> None:
    """Resolve the config into each site's ``drops``.

    Raises:
        ConfigError: layers beyond the model, an output position without a head, or a rate pattern that decides nothing.
    """
    depths = {stack.role: stack.depths for stack in stacks}
    chosen = resolve_layers(config.layers, depths.get("encoder"), depths.get("decoder"))
    asked: list[tuple[Site, int]] = []
    for stack in stacks:
        for site in stack.sites:
            for depth in _depths(site, stack, chosen[stack.role]):
                drop = _drop(config, site, depth)
                if drop is None:
                    continue
                asked.append((site, depth))
                if drop.threshold:
                    site.drops[depth] = drop
                    site.layer.guided |= drop.start == "attention"
        stack.entries = (_entries(stack, cross=False), _entries(stack, cross=True))
    if config.output is not None and output is not None:
        asked.append((output, 0))
        drop = SiteDrop("output", "element", rate_for(config, config.output.rate, [output.name]), rescale=True)
        if drop.threshold:
            output.drops[0] = drop
    elif config.output is not None and config.output.rate > 0:
        raise ConfigError(
            f"the model has no classifier or language-modelling head for the output position "
            f"(got output rate {config.output.rate}); set output=None"
        )
    _check_rate_pattern(config, stacks, output, asked)


def _entries(stack: Stack, cross: bool) -> tuple[PlanEntry, ...]:
    found = {}
    for site in stack.sites:
        if site.kind == "input" or site.crosses is not cross:
            continue
        for depth, drop in site.drops.items():
            if plannable(drop.pattern, drop.start):
                heads = _heads(stack, drop.heads) if site.kind in ATTENTION_KINDS else 1
                found[depth, site.site] = PlanEntry(depth, site.site, drop.pattern, heads, drop.threshold)
    return tuple(found.values())


def _heads(stack: Stack, heads: str) -> int:
    """How many heads attention masks are drawn for; the first pass checks it against the tensors."""
    config: Any = stack.module.config
    own = getattr(config, f"{stack.role}_attention_heads", None) or config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", None) or own
    return int(grouped if heads == "group" else own)


def _depths(site: Site, stack: Stack, chosen: frozenset[int]) -> list[int]:
    """The chosen depths that this site's module serves: its own, or all of its calls where it is shared."""
    if site.kind == "input":
        return [0]
    index = site.layer.index
    return sorted(depth for depth in chosen if (depth % stack.inner if stack.spec.shared else depth) == index)


def _names(site: Site, depth: int) -> list[str]:
    """The names that rate patterns know a site by: its layer's and its own."""
    if site.stack is None or site.kind == "input":
        return [site.name]
    return [layer_name(site.stack, depth), site.name]


def _check_rate_pattern(
    config: HiddenKeyConfig, stacks: list[Stack], output: Site | None, asked: list[tuple[Site, int]]
) -> None:
    """Every pattern names something, and one with a rate something that the config asks to drop (``asked``)."""
    sites = [(site, depth) for stack in stacks for site in stack.sites for depth in range(stack.depths)]
    sites += [(output, 0)] if output is not None else []
    for pattern, rate in config.rate_pattern.items():
        if not any(matches(pattern, _names(site, depth)) for site, depth in sites):
            known = ", ".join(dict.fromkeys(_names(site, depth)[0] for site, depth in sites[:6]))
            raise ConfigError(
                f"a rate pattern matches no layer and no module of the model (got {pattern!r}); names look like {known}"
            )
        if rate > 0 and not any(matches(pattern, _names(site, depth)) for site, depth in asked):
            raise ConfigError(
                f"a rate pattern matches only layers and modules that drop nothing (got {pattern!r}: {rate}, "
                f"layers={config.layers!r}); drop there (layers, attention, hidden, input, output), or leave the pattern out"
            )


def _drop(config: HiddenKeyConfig, site: Site, depth: int) -> SiteDrop | None:
    names = _names(site, depth)
    if site.kind in ATTENTION_KINDS:
        part = config.attention
        if part is None:
            return None
        return SiteDrop(part.position, part.pattern, rate_for(config, part.rate, names), heads=part.heads)
    if site.kind == "ffn":
        hidden = config.hidden
        if hidden is None:
            return None
        rescale = hidden.pattern == "element" if hidden.rescale is None else hidden.rescale
        rate = rate_for(config, hidden.rate, names)
        return SiteDrop("hiddencut", hidden.pattern, rate, rescale=rescale, start=hidden.start)
    if config.input is None:
        return None
    return SiteDrop("input", "element", rate_for(config, config.input.rate, names), rescale=True)


def layer_name(stack: Stack, depth: int) -> str:
    """The canonical name of a layer, as rate patterns see it (a shared module counts its depths as BERT does)."""
    layers = "encoder.layer" if stack.spec.shared else stack.spec.layers
    return ".".join(part for part in (stack.name, layers, str(depth)) if part)


def stream_site(kind: str, role: str, encoder_decoder: bool) -> str:
    """The stream's site name: a decoder that stands beside an encoder draws from sites of its own."""
    beside = encoder_decoder and role == "decoder" and kind in ("attention", "ffn", "input")
    return f"decoder-{kind}" if beside else kind


def _stack(module: Any, name: str, spec: StackSpec, family: Family) -> Stack:
    role = spec.role or _config_role(module)
    modules = list(_layer_modules(module, spec))
    stack = Stack(module, name, role, spec, depths=len(modules), layer_modules=[layer for _, layer in modules])
    if spec.shared:
        stack.groups = list(module.get_submodule(spec.shared).children())
        stack.inner = len(modules) // len(stack.groups)
        stack.depths = module.config.num_hidden_layers * stack.inner
    for index, (path, layer_module) in enumerate(modules):
        layer = Layer(index % stack.inner if spec.shared else index, _join(name, path))
        for kind, below in (("attention", spec.attention), ("cross-attention", spec.cross), ("ffn", spec.ffn)):
            target = _submodule(layer_module, below)
            if target is None and kind != "cross-attention":
                raise UnsupportedModelError(
                    f"layer {layer.name!r} has no {kind} module at {below!r} (got {type(layer_module).__name__}); "
                    "the model's code differs from the family's"
                )
            if target is not None:
                site = stream_site(kind, role, family.encoder_decoder)
                stack.sites.append(Site(kind, site, _join(layer.name, below), target, layer, stack))
    _check_once(module, stack)
    embedding = module.get_input_embeddings()
    path = next(path for path, candidate in module.named_modules() if candidate is embedding)
    embed_layer = Layer(0, _join(name, path))
    embed_site = stream_site("input", role, family.encoder_decoder)
    stack.sites.append(Site("input", embed_site, embed_layer.name, embedding, embed_layer, stack))
    return stack


def _check_once(module: nn.Module, stack: Stack) -> None:
    """Every layer, attention and FFN is in one place: of a module that runs at several depths no one would know which it is.

    Of families that share their layers the code says so.
    """
    if stack.spec.shared:
        return
    layers = _layer_modules(module, stack.spec, remove_duplicate=False)
    modules = [("layer", layer) for _, layer in layers] + [(site.kind, site.module) for site in stack.sites]
    seen: set[int] = set()
    for kind, one in modules:
        if id(one) in seen:
            named = module.named_modules(remove_duplicate=False)
            places = [_join(stack.name, name) for name, other in named if other is one]
            raise UnsupportedModelError(
                f"one {kind} module is used at several depths (got {' and '.join(places[:2])}); give each its own copy"
            )
        seen.add(id(one))


def _layer_modules(stack: nn.Module, spec: StackSpec, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    pattern = re.compile(re.escape(spec.layers).replace(r"\*", r"\d+") + r"\.\d+")
    named = stack.named_modules(remove_duplicate=remove_duplicate)
    return ((name, module) for name, module in named if pattern.fullmatch(name))


def _fits(module: nn.Module, spec: StackSpec, family: Family) -> bool:
    if not any(base.__name__ == spec.module_class for base in type(module).__mro__):
        return False
    same_class = [other for other in family.stacks if other.module_class == spec.module_class]
    return len(same_class) == 1 or spec.role == _config_role(module)


def _config_role(module: nn.Module) -> str:
    return "decoder" if getattr(module.config, "is_decoder", False) else "encoder"


def _submodule(module: nn.Module, path: str | None) -> nn.Module | None:
    if path is None:
        return None
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _join(*parts: Any) -> str:
    return ".".join(str(part) for part in parts if part)
