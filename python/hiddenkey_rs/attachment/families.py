"""Where each model family keeps its attention and its feed-forward network: one entry a family.

A new family that follows transformers' attention interface is one :class:`Family` here and one tiny model in
``tests/families.py``; nothing else knows families by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class StackSpec:
    """A stack of layers: the module that embeds tokens, makes the attention mask and runs the layers.

    Paths are relative to the stack (``layers``) or to one of its layers (the rest).
    """

    module_class: str
    layers: str
    attention: str
    ffn: str
    cross: str | None = None
    role: str | None = None
    """``"encoder"`` or ``"decoder"``; ``None`` asks the stack's ``config.is_decoder``."""
    shared: str | None = None
    """Path pattern of the module group whose *calls* are the layers (ALBERT reuses one module for every layer)."""


@dataclass(frozen=True)
class Family:
    """One model family: its ``config.model_type`` and its stacks."""

    model_type: str
    stacks: tuple[StackSpec, ...]
    minimum_transformers: str = "5.5"

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder and a decoder stack belong together (their sites are then kept apart)."""
        return len(self.stacks) > 1


def _bert_like(prefix: str) -> tuple[StackSpec, ...]:
    return (StackSpec(f"{prefix}Model", "encoder.layer", "attention.self", "output.dense", "crossattention.self"),)


def _llama_like(prefix: str) -> tuple[StackSpec, ...]:
    return (StackSpec(f"{prefix}Model", "layers", "self_attn", "mlp", role="decoder"),)


# The ALBERT entry's `layers` names one group's modules; `shared` names the group, whose calls count the depth.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bert", _bert_like("Bert")),
        Family("roberta", _bert_like("Roberta")),
        Family("xlm-roberta", _bert_like("XLMRoberta")),
        Family("electra", _bert_like("Electra")),
        Family("distilbert", (StackSpec("DistilBertModel", "transformer.layer", "attention", "ffn", role="encoder"),)),
        Family(
            "albert",
            (
                StackSpec(
                    "AlbertModel",
                    "encoder.albert_layer_groups.*.albert_layers",
                    "attention",
                    "ffn_output",
                    role="encoder",
                    shared="encoder.albert_layer_groups",
                ),
            ),
        ),
        Family("modernbert", (StackSpec("ModernBertModel", "layers", "attn", "mlp", role="encoder"),)),
        Family("gpt2", (StackSpec("GPT2Model", "h", "attn", "mlp", "crossattention", role="decoder"),)),
        Family("gpt_neox", (StackSpec("GPTNeoXModel", "layers", "attention", "mlp", role="decoder"),)),
        Family("opt", (StackSpec("OPTDecoder", "layers", "self_attn", "fc2", role="decoder"),)),
        Family("llama", _llama_like("Llama")),
        Family("qwen3", _llama_like("Qwen3")),
        Family("mistral", _llama_like("Mistral")),
        Family("gemma2", _llama_like("Gemma2")),
        Family("phi3", _llama_like("Phi3")),
        Family("mixtral", _llama_like("Mixtral")),
        Family("gpt_oss", _llama_like("GptOss")),
        Family(
            "t5",
            (
                StackSpec("T5Stack", "block", "layer.0.SelfAttention", "layer.1.DenseReluDense", role="encoder"),
                StackSpec(
                    "T5Stack",
                    "block",
                    "layer.0.SelfAttention",
                    "layer.2.DenseReluDense",
                    "layer.1.EncDecAttention",
                    role="decoder",
                ),
            ),
            minimum_transformers="5.16",
        ),
        Family(
            "bart",
            (
                StackSpec("BartEncoder", "layers", "self_attn", "fc2", role="encoder"),
                StackSpec("BartDecoder", "layers", "self_attn", "fc2", "encoder_attn", role="decoder"),
            ),
        ),
    )
}

# Families that people will try and that cannot work, with the reason they deserve to read.
REFUSED: dict[str, str] = {
    "deberta": "its disentangled attention never calls transformers' attention interface",
    "deberta-v2": "its disentangled attention never calls transformers' attention interface",
    "bloom": "it adds the attention mask as numbers inside its own attention, so a boolean mask would change its results",
    "falcon": "its attention does not go through transformers' attention interface",
    "gptj": "its attention does not go through transformers' attention interface",
    "gpt_neo": "its attention does not go through transformers' attention interface",
    "encoder-decoder": "it joins two models of different families; attach to its encoder and decoder one by one",
}


def family_of(model_type: str, transformers_version: str) -> Family:
    """The family of a ``config.model_type``, or an :class:`UnsupportedModelError` that says why there is none."""
    family = FAMILIES.get(model_type)
    if family is None:
        reason = REFUSED.get(model_type, "no entry of the family registry describes it")
        raise UnsupportedModelError(
            f"this model family cannot be attached to, because {reason} (got model_type {model_type!r}); "
            f"supported families: {', '.join(sorted(FAMILIES))}"
        )
    if _release(transformers_version) < _release(family.minimum_transformers):
        raise UnsupportedModelError(
            f"family {model_type!r} joined transformers' attention interface in {family.minimum_transformers} "
            f"(got transformers {transformers_version}); install transformers>={family.minimum_transformers}"
        )
    return family


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int("".join(character for character in minor if character.isdigit()))
