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
    tells_documents: bool = False
    """Whether packed documents do not see each other where ``position_ids`` restart."""


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


def _llama_like(prefix: str, tells_documents: bool = True) -> tuple[StackSpec, ...]:
    return (StackSpec(f"{prefix}Model", "layers", "self_attn", "mlp", role="decoder", tells_documents=tells_documents),)


def _bart_like(prefix: str) -> tuple[StackSpec, ...]:
    return (
        StackSpec(f"{prefix}Encoder", "layers", "self_attn", "fc2", role="encoder"),
        StackSpec(f"{prefix}Decoder", "layers", "self_attn", "fc2", "encoder_attn", role="decoder"),
    )


def _t5_like(prefix: str) -> tuple[StackSpec, ...]:
    own, cross = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    return (
        StackSpec(f"{prefix}Stack", "block", own, "layer.1.DenseReluDense", role="encoder"),
        StackSpec(f"{prefix}Stack", "block", own, "layer.2.DenseReluDense", cross, role="decoder"),
    )


_BERT_LIKE = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "xlm-roberta-xl": "XLMRobertaXL",
    "roberta-prelayernorm": "RobertaPreLayerNorm",
    "camembert": "Camembert",
    "electra": "Electra",
    "ernie": "Ernie",
    "data2vec-text": "Data2VecText",
}
_LLAMA_LIKE = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "ministral3": "Ministral3",
    "mixtral": "Mixtral",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "phi": "Phi",
    "phi3": "Phi3",
    "smollm3": "SmolLM3",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "granite": "Granite",
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "starcoder2": "Starcoder2",
    "glm": "Glm",
    "glm4": "Glm4",
    "exaone4": "Exaone4",
    "helium": "Helium",
    "seed_oss": "SeedOss",
    "ernie4_5": "Ernie4_5",
    "apertus": "Apertus",
    "deepseek_v3": "DeepseekV3",
}
_BART_LIKE = {
    "bart": "Bart",
    "mbart": "MBart",
    "pegasus": "Pegasus",
    "marian": "Marian",
    "m2m_100": "M2M100",
    "blenderbot": "Blenderbot",
    "plbart": "PLBart",
}

# The ALBERT entry's `layers` names one group's modules; `shared` names the group, whose calls count the depth.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(Family(model_type, _bert_like(prefix)) for model_type, prefix in _BERT_LIKE.items()),
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
        Family("eurobert", (StackSpec("EuroBertModel", "layers", "self_attn", "mlp", role="encoder"),)),
        Family("modernbert", (StackSpec("ModernBertModel", "layers", "attn", "mlp", role="encoder"),)),
        Family(
            "gpt2",
            (StackSpec("GPT2Model", "h", "attn", "mlp", role="decoder", tells_documents=True),),
        ),
        Family(
            "gpt_neox", (StackSpec("GPTNeoXModel", "layers", "attention", "mlp", role="decoder", tells_documents=True),)
        ),
        Family("opt", (StackSpec("OPTDecoder", "layers", "self_attn", "fc2", role="decoder"),)),
        *(Family(model_type, _llama_like(prefix)) for model_type, prefix in _LLAMA_LIKE.items()),
        Family("gpt_oss", _llama_like("GptOss", tells_documents=False)),
        Family("t5", _t5_like("T5"), minimum_transformers="5.16"),
        Family("mt5", _t5_like("MT5"), minimum_transformers="5.16"),
        *(Family(model_type, _bart_like(prefix)) for model_type, prefix in _BART_LIKE.items()),
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
    "stablelm": "its layers hand no keyword arguments down to their attention",
    "nemotron": "its layers hand no keyword arguments down to their attention",
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
