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
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "modernbert")
ENCODER_DECODERS = ("t5", "bart")
DECODERS = tuple(name for name in FAMILIES if name not in ENCODERS + ENCODER_DECODERS)


def build(family: str, seed: int = 0, attention: str = "sdpa", **changes: Any) -> Any:
    """A tiny random model of the family in training mode."""
    version = tuple(int(part) for part in tf.__version__.split(".")[:2])
    if family == "t5" and version < (5, 16):
        pytest.skip("T5 joined the attention interface in transformers 5.16")
    config_name, model_name, arguments = FAMILIES[family]
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
