"""One tiny random model a family, for every test that must hold for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

VOCABULARY = 97
LAYERS = 4
_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": LAYERS, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    "d_model": 16,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_GPT2 = {"n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 40}
_ALBERT = {**_BERT, "embedding_size": 8}
_DISTIL = {"dim": 16, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 32, "max_position_embeddings": 40}
_OPT = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
}
_WINDOW = {"sliding_window": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_MARIAN = {**_BART, "pad_token_id": 1, "forced_eos_token_id": None}
_WITHOUT_SIZE = {name: value for name, value in _LLAMA.items() if name != "head_dim"}  # the width over the heads
_DEEPSEEK = {
    **_WITHOUT_SIZE,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
_MODERN = {**_BERT, "local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0}

# model_type -> (config class, model class, config arguments)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _BERT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**_BERT, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", {**_BERT, "pad_token_id": 1}),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", {**_BERT, "embedding_size": 8}),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", _DISTIL),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", _ALBERT),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", _MODERN),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _BERT),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_OPT, "max_position_embeddings": 40}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA, **_WINDOW}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA, **_WINDOW, "query_pre_attn_scalar": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_LLAMA, **_MOE}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**_LLAMA, **_MOE, **_WINDOW}),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    # As one of the above, but for their names.
    "camembert": ("CamembertConfig", "CamembertForSequenceClassification", {**_BERT, "pad_token_id": 1}),
    "xlm-roberta-xl": ("XLMRobertaXLConfig", "XLMRobertaXLForSequenceClassification", {**_BERT, "pad_token_id": 1}),
    "roberta-prelayernorm": (
        "RobertaPreLayerNormConfig",
        "RobertaPreLayerNormForSequenceClassification",
        {**_BERT, "pad_token_id": 1},
    ),
    "ernie": ("ErnieConfig", "ErnieForSequenceClassification", _BERT),
    "data2vec-text": ("Data2VecTextConfig", "Data2VecTextForSequenceClassification", {**_BERT, "pad_token_id": 1}),
    "eurobert": ("EuroBertConfig", "EuroBertForSequenceClassification", {**_LLAMA, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _WITHOUT_SIZE),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_WITHOUT_SIZE, **_EXPERTS, "shared_expert_intermediate_size": 8},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_LLAMA, **_EXPERTS}),
    "ministral": ("MinistralConfig", "MinistralForCausalLM", {**_LLAMA, **_WINDOW}),
    "ministral3": ("Ministral3Config", "Ministral3ForCausalLM", _LLAMA),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _LLAMA),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_LLAMA, **_WINDOW, "query_pre_attn_scalar": 4}),
    "phi": ("PhiConfig", "PhiForCausalLM", _WITHOUT_SIZE),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", _WITHOUT_SIZE),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _WITHOUT_SIZE),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _WITHOUT_SIZE),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {**_WITHOUT_SIZE, **_WINDOW}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**_WITHOUT_SIZE, "logits_scaling": 3.0}),
    "cohere": ("CohereConfig", "CohereForCausalLM", _WITHOUT_SIZE),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {**_WITHOUT_SIZE, **_WINDOW}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", _WITHOUT_SIZE),
    "glm": ("GlmConfig", "GlmForCausalLM", _LLAMA),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", _LLAMA),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", _WITHOUT_SIZE),
    "helium": ("HeliumConfig", "HeliumForCausalLM", _LLAMA),
    "seed_oss": ("SeedOssConfig", "SeedOssForCausalLM", _LLAMA),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", _LLAMA),
    "apertus": ("ApertusConfig", "ApertusForCausalLM", _WITHOUT_SIZE),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _DEEPSEEK),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", _T5),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _BART),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", _BART),
    "marian": ("MarianConfig", "MarianMTModel", _MARIAN),
    "m2m_100": ("M2M100Config", "M2M100ForConditionalGeneration", _BART),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration", _BART),
    "plbart": ("PLBartConfig", "PLBartForConditionalGeneration", _BART),
}
OWN = tuple(FAMILIES)[: list(FAMILIES).index("camembert")]
"""Those whose code is not that of another one but for names."""
ENCODERS = tuple(name for name, (_, model, _) in FAMILIES.items() if "SequenceClassification" in model)
ENCODER_DECODERS = ("t5", "bart", "mt5", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "plbart")
DECODERS = tuple(name for name in FAMILIES if name not in ENCODERS + ENCODER_DECODERS)


def build(family: str, seed: int = 0, attention: str = "sdpa", **changes: Any) -> Any:
    """A tiny random model of the family in training mode."""
    version = tuple(int(part) for part in tf.__version__.split(".")[:2])
    if family in ("t5", "mt5") and version < (5, 16):
        pytest.skip("T5 joined the attention interface in transformers 5.16")
    config_name, model_name, arguments = FAMILIES[family]
    if not hasattr(tf, config_name):
        pytest.skip(f"transformers {tf.__version__} has no {family}")
    config = getattr(tf, config_name)(**{"vocab_size": VOCABULARY, **arguments, **changes})
    if family in ("gemma2", "gpt_oss"):  # soft-capping and sinks have no SDPA form in transformers
        attention = "eager"
    torch.manual_seed(seed)
    model = getattr(tf, model_name)._from_config(config, attn_implementation=attention)
    return model.train()


def batch(family: str, rows: int = 3, length: int = 9, side: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """A padded batch with labels; row b has ``length - 2 b`` real tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY - 2, (rows, length), generator=generator)
    columns = torch.arange(length)
    lengths = length - 2 * torch.arange(rows)[:, None]
    mask = (columns < lengths) if side == "right" else (columns >= length - lengths)
    ids = ids.masked_fill(~mask, 1)
    result = {"input_ids": ids, "attention_mask": mask.long()}
    if family in ENCODERS:
        return {**result, "labels": torch.arange(rows) % 2}
    if family in ENCODER_DECODERS:
        target = torch.randint(5, VOCABULARY - 2, (rows, length - 2), generator=generator)
        return {**result, "labels": target}
    return {**result, "labels": ids.masked_fill(~mask, -100)}
