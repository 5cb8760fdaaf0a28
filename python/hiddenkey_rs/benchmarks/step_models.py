"""Models, batches and variants of ``bench step``: everything random, so that nothing has to be downloaded.

A :class:`Runner` is one model with one variant of dropout. Runners of a model share its frozen weights and differ in
nothing but the variant; adapters begin with the same numbers.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from .. import ops
from ..attachment import attach
from ..config import Consistency, HiddenKeyConfig
from ..errors import ConfigError

RATE = 0.1
RANK = 8
_SPECIAL = 5
"""Tokens that a batch has none of."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A model and its batch. ``ffn``: width of the feed-forward network; 0 = the family's usual multiple of ``hidden``."""

    model: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    length: int
    batch: int
    ffn: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "vocab", "length", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1 (got {getattr(self, name)}); see --help")
        if self.vocab <= _SPECIAL:
            raise ConfigError(f"vocab must be above {_SPECIAL}, the special tokens (got {self.vocab}); see --help")
        if self.hidden % (2 * self.heads):
            raise ConfigError(
                f"hidden must be an even multiple of heads (got {self.hidden} for {self.heads} heads); change one of them"
            )

    @property
    def label(self) -> str:
        """What rows call the model: its kind, layers and width."""
        return f"{self.model} {self.layers}x{self.hidden}"

    @property
    def decoder(self) -> bool:
        """Whether the model is a decoder."""
        return self.model == "decoder"


@dataclass(frozen=True)
class Variant:
    """One way to drop.

    Attributes:
        name: as rows show it.
        preset: what is attached; None = the model alone.
        stock: whether the model's own dropout is on. A LLaMA-type decoder has none: its adapters' stands in.
        adapter: ``lora_dropout``.
        both: the consistency term's gradient runs through both branches.
        doubled: R-Drop as its authors publish it: the batch twice, in a loop of one's own.
        checkpointing: activations are recomputed in backward.
        compiled: by ``torch.compile``. graphs: and by CUDA graphs (``reduce-overhead``): the host launches passes, not kernels.
        impl: who computes attention and HiddenCut, as ``attach`` takes it.
    """

    name: str
    preset: str | None = None
    stock: bool = False
    adapter: bool = False
    both: bool = False
    doubled: bool = False
    checkpointing: bool = False
    compiled: bool = False
    graphs: bool = False
    impl: str = "auto"

    @property
    def config(self) -> HiddenKeyConfig | None:
        """What is attached."""
        if self.preset is None:
            return None
        config = HiddenKeyConfig.preset(self.preset)
        return replace(config, consistency=Consistency(gradient="both")) if self.both else config


NONE = Variant("no dropout")
ADAPTER = Variant("lora_dropout=0.1", adapter=True)
STOCK = Variant("stock dropout", stock=True)
MINUS = Variant("HiddenKey-", preset="hiddenkey-minus")
FULL = Variant("HiddenKey", preset="hiddenkey")
BOTH = Variant("HiddenKey, both branches", preset="hiddenkey", both=True)
DOUBLED = Variant("R-Drop, doubled batch", stock=True, doubled=True)
RDROP = Variant("r-drop preset", preset="r-drop", stock=True)
MINUS_KERNELS = Variant("HiddenKey-, Triton", preset="hiddenkey-minus", impl="triton")
FULL_KERNELS = Variant("HiddenKey, Triton", preset="hiddenkey", impl="triton")
"""In Triton's interpreter, where there is no device on which ``auto`` would take them."""
MINUS_MASKS = Variant("HiddenKey-, SDPA with masks", preset="hiddenkey-minus", impl="sdpa")
"""On CUDA, where ``auto`` takes the kernels: what they save."""
NONE_AGAIN = Variant("no dropout, checkpointing", checkpointing=True)
FULL_AGAIN = Variant("HiddenKey, checkpointing", preset="hiddenkey", checkpointing=True)
COMPILED = tuple(
    replace(variant, name=f"{variant.name}, compiled", compiled=True) for variant in (NONE, ADAPTER, MINUS, FULL)
)
GRAPHS = tuple(
    replace(variant, name=f"{variant.name}, CUDA graphs", compiled=True, graphs=True)
    for variant in (NONE, ADAPTER, MINUS, FULL)
)


def variants(shape: Shape, compiled: bool, graphs: bool, device: str) -> list[Variant]:
    """The variants of a model. Those whose steps are long, and that no goal is about, are left out on a CPU."""
    found = [NONE, ADAPTER, MINUS, FULL, DOUBLED, RDROP]
    if device != "cpu":
        found.append(MINUS_MASKS)
    elif ops.triton_attention.unable(torch.empty(0)) is None:
        found += [MINUS_KERNELS, FULL_KERNELS]
    if not shape.decoder:
        found.insert(2, STOCK)
    if not shape.decoder or device != "cpu":
        found += [BOTH, NONE_AGAIN, FULL_AGAIN]
    return [*found, *(COMPILED if compiled else ()), *(GRAPHS if graphs else ())]


def base_model(shape: Shape, device: str) -> nn.Module:
    """The model without adapters or dropout, its weights random and frozen, on the device."""
    torch.manual_seed(0)
    common = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": max(512, shape.length),
    }
    dtype = getattr(torch, shape.dtype)
    if shape.decoder:
        ffn = shape.ffn or -(-shape.hidden * 8 // 3 // 32) * 32
        # A cache would only be refused by checkpointing, with a warning.
        config = LlamaConfig(**common, intermediate_size=ffn, use_cache=False)
        kind = LlamaForCausalLM
    else:
        config = BertConfig(**common, intermediate_size=shape.ffn or 4 * shape.hidden, num_labels=2)
        kind = BertForSequenceClassification
    with torch.device(device):
        model = kind._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.to(device).requires_grad_(False)


def make_batch(shape: Shape, device: str) -> Batch:
    """Random tokens without padding, as a collator hands them over; every token of a decoder bears loss."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(_SPECIAL, shape.vocab, (shape.batch, shape.length), generator=generator)
    labels = ids if shape.decoder else torch.arange(shape.batch) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


class Runner:
    """One variant's model, optimiser and step."""

    def __init__(self, shape: Shape, variant: Variant, base: nn.Module, device: str) -> None:
        self.shape, self.variant, self.device = shape, variant, device
        frozen = {id(part): part for part in itertools.chain(base.parameters(), base.buffers())}
        model = copy.deepcopy(base, frozen)  # what the memo holds is shared, not copied
        stock = variant.stock and not shape.decoder
        for module in model.modules():
            _set_dropout(module, RATE if stock else 0.0)
        torch.manual_seed(1)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's own calls raise them
        self.model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=RANK,
                lora_alpha=16,
                lora_dropout=RATE if variant.adapter or (variant.stock and shape.decoder) else 0.0,
                target_modules=["q_proj", "v_proj"] if shape.decoder else ["query", "value"],
                task_type="CAUSAL_LM" if shape.decoder else "SEQ_CLS",
            ),
        ).train()
        with torch.no_grad():  # an adapter that has learned something: at first B is zero, and so is A's gradient
            for name, weight in self.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05)
        if variant.checkpointing:
            # Its name until transformers 5.22; the way in is the same.
            enable = (
                getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        config = variant.config
        how = ("keep" if stock else "off", variant.impl)
        self.handle = attach(self.model, config, *how) if config is not None else None
        if variant.compiled:
            # Of one piece of code, however many models run it; past eight it would run uncompiled.
            torch._dynamo.config.recompile_limit = 64
        mode = "reduce-overhead" if variant.graphs else None
        self.call: Any = torch.compile(self.model, mode=mode) if variant.compiled else self.model
        self.batch = make_batch(shape, device)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4)
        self.steps = 0

    def loss(self, step: int, examples: int | None = None) -> Tensor:
        """The step's loss on the first ``examples`` rows."""
        batch = {name: value[:examples] for name, value in self.batch.items()}
        if self.handle is not None:
            with self.handle.step(step, range(len(batch["labels"]))):
                return self.handle.compute(batch, model=self.call).loss
        return _doubled(self.call, batch, self.shape.decoder) if self.variant.doubled else self.call(**batch).loss

    def step(self) -> None:
        """One optimiser step."""
        self.loss(self.steps).backward()
        self.update()
        self.steps += 1

    def update(self) -> None:
        """What follows backward."""
        self.optimiser.step()
        self.optimiser.zero_grad()

    def gradients(self, step: int, examples: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss on a few examples, and the gradient of every trained weight."""
        loss = self.loss(step, examples)
        loss.backward()
        found = {n: p.grad.detach().float().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimiser.zero_grad()
        return loss.detach().float(), found


def _set_dropout(module: nn.Module, rate: float) -> None:
    """The model's own dropout, in modules and in the plain numbers that attention hands on."""
    if isinstance(module, nn.Dropout):
        module.p = rate
    for name in ("attention_dropout", "dropout_prob"):
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, rate)


def _doubled(model: Any, batch: Batch, decoder: bool) -> Tensor:
    """R-Drop (Liang et al., 2021, equations 1-3) as its authors wrote it: the batch twice, both passes with gradient."""
    outputs = model(**{name: torch.cat([value, value]) for name, value in batch.items()})
    logits = outputs.logits[:, :-1] if decoder else outputs.logits
    first, second = (part.flatten(0, -2) for part in logits.chunk(2))
    p, q = F.log_softmax(first.float(), dim=-1), F.log_softmax(second.float(), dim=-1)
    there = F.kl_div(p, q, reduction="none", log_target=True).sum(dim=-1)
    back = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)
    return outputs.loss + 0.5 * (there + back).mean()
