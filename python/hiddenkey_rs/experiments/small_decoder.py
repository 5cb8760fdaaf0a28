"""The recipe of the small decoder: its tokenizer, its model, and the blocks of tokens that it reads."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError
from ..serialise import Serialisable, choice

FAMILIES = ("gpt2", "llama")
_PAD, _EOS = "<pad>", "<eos>"


def _is(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Recipe(Serialisable):
    """Everything that the weights depend on, besides the text."""

    family: str = _is("gpt2", "gpt2 or llama")
    vocabulary: int = _is(4096, "tokens, the 256 bytes and two special ones included")
    width: int = _is(256, "of the hidden states")
    layers: int = _is(6, "how many")
    heads: int = _is(4, "attention heads")
    context: int = _is(512, "tokens of a block, and positions of the model")
    batch_size: int = _is(8, "blocks of a step")
    epochs: int = _is(3, "passes over the text")
    lr: float = _is(2e-3, "peak learning rate")
    warmup: float = _is(0.05, "share of the steps that warm up")
    weight_decay: float = _is(0.1, "AdamW's, of matrices")
    seed: int = _is(0, "of weights and order")
    bf16: bool = _is(True, "bfloat16 autocast")

    def __post_init__(self) -> None:
        choice(self.family, FAMILIES, "family")
        for name in ("width", "layers", "heads", "context", "batch_size", "epochs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number above 0 (got {value!r}); mend --{name}")
        if self.vocabulary < 258:
            raise ConfigError(
                f"a vocabulary holds 256 bytes and two tokens (got {self.vocabulary}); raise --vocabulary"
            )
        if self.width % (2 * self.heads):
            raise ConfigError(f"heads must share the width evenly (got {self.width} and {self.heads}); change one")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is a share of the steps (got {self.warmup!r}); give a value in [0, 1)")
        if not self.lr > 0:
            raise ConfigError(f"the learning rate must be above 0 (got {self.lr!r}); 2e-3 is a start")


def bpe_tokenizer(texts: Sequence[str], size: int) -> Any:
    """A byte-level BPE tokenizer of the texts: no text is unknown to it. ``<pad>`` is token 0, ``<eos>`` token 1."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_PAD, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=_PAD, eos_token=_EOS)


def new_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The recipe's model with weights of its seed, in training mode. It has no dropout but what fine-tuning adds."""
    import transformers

    size = recipe.width
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(recipe.seed)
    if recipe.family == "gpt2":
        gpt2 = transformers.GPT2Config(
            n_embd=size,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            n_positions=recipe.context,
            activation_function="gelu_pytorch_tanh",  # GPT-2's, in one kernel
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
            **common,
        )
        return transformers.GPT2LMHeadModel._from_config(gpt2, attn_implementation="sdpa").train()
    llama = transformers.LlamaConfig(
        hidden_size=size,
        intermediate_size=8 * size // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        **common,
    )
    return transformers.LlamaForCausalLM._from_config(llama, attn_implementation="sdpa").train()


def blocks(documents: Sequence[Sequence[int]], context: int, seed: int, epoch: int) -> list[list[int]]:
    """The epoch's order cut into blocks of at most ``context`` tokens that hold whole documents.

    A function of its arguments: a resumed epoch is the same epoch.
    """
    order = list(range(len(documents)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    found: list[list[int]] = [[]]
    for n in order:
        if len(found[-1]) + len(documents[n]) > context:
            found.append([])
        found[-1].extend(documents[n])
    return found


def rate_at(recipe: Recipe, place: float) -> float:
    """The learning rate at ``place`` (0..1) of the way, as a share of its peak: up in a line, down in a cosine to a tenth.

    Example:
        >>> [round(rate_at(Recipe(warmup=0.2), place), 3) for place in (0, 0.1, 0.2, 0.6, 1)]
        [0.01, 0.5, 1.0, 0.55, 0.1]
    """
    if place < recipe.warmup:
        return max(place / recipe.warmup, 0.01)
    return 0.55 + 0.45 * math.cos(math.pi * (place - recipe.warmup) / (1 - recipe.warmup))
