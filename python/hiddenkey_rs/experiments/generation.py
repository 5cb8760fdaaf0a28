"""Text from a language model, as the data-to-text tasks are scored: one text a source, found by beam search."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError
from . import folder
from .data import Row
from .features import prompt_ids
from .tasks import Task
from .text_metrics import E2E, WEBNLG, score_parts

GENERATED = "generated-{split}.jsonl"


@dataclass(frozen=True)
class Decoding:
    """How texts are searched for. The defaults are the paper's for E2E.

    ``length_penalty``: a text's score is its log-probability over its length to this power. ``no_repeat``: no run of so
    many tokens occurs twice in a text (0: any may); what the prompt says may be said again. ``batch_size``: sources at
    once, each with ``beams`` texts.
    """

    beams: int = 10
    length_penalty: float = 0.9
    no_repeat: int = 4
    max_new_tokens: int = 128
    batch_size: int = 16
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, least in (("beams", 1), ("no_repeat", 0), ("max_new_tokens", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number from {least} up (got {value!r}); mend the decoding")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty must be a number (got {self.length_penalty!r}); 1 is a mean over tokens")


_TASKS = {"e2e": (Decoding(), E2E), "webnlg": (Decoding(length_penalty=0.8), WEBNLG)}


def decoding_for(task: Task, **changes: Any) -> Decoding:
    """The paper's decoding of a task (E2E's for any other), with ``changes``."""
    return replace(_TASKS.get(task.name, _TASKS["e2e"])[0], **changes)


@dataclass(frozen=True)
class Group:
    """A source, all texts that people wrote for it, and the part of the set it belongs to (``seen``, ``unseen``)."""

    source: str
    refs: tuple[str, ...]
    part: str | None = None


def grouped(rows: Sequence[Row], task: Task) -> list[Group]:
    """The rows of a language-modelling task, those of one source together, in the order of their first rows.

    A row's field ``seen`` says whether its kind occurs in training, as in WebNLG.

    Raises:
        ConfigError: a task that asks for no text. DataError: a source without any reference.
    """
    if task.kind != "lm":
        raise ConfigError(
            f"texts are generated for language-modelling tasks (got {task.name!r}, {task.kind}); see --task"
        )
    source, target = task.fields
    found: dict[str, tuple[list[str], str | None]] = {}
    for row in rows:
        part = None if "seen" not in row else "seen" if row["seen"] else "unseen"
        refs, _ = found.setdefault(row[source], ([], part))
        if row[target].strip():
            refs.append(row[target])
    for text, (refs, _) in found.items():
        if not refs:
            raise DataError(f"a source has no reference (got {text!r}); give it a text in {target!r}, or leave it out")
    return [Group(text, tuple(refs), part) for text, (refs, part) in found.items()]


def generate(
    model: Any, tokenizer: Any, sources: Sequence[str], decoding: Decoding, progress: bool = False
) -> list[str]:
    """One text a source, in the sources' order. Nothing drops and nothing is drawn: the same again every time.

    Args:
        model: causal, or encoder-decoder; with adapters or without, attached to or not. Its mode is put back.
        tokenizer: the model's own. sources: without the line's end that a causal model's prompt gets.
        decoding: how to search. progress: show it on standard error.

    Raises:
        ConfigError: a tokenizer without the tokens that padding and stopping need, or no room for a prompt.
    """
    _check_tokens(tokenizer)
    seq2seq = bool(model.config.is_encoder_decoder)
    prompts = _prompts(model, tokenizer, sources, decoding, seq2seq)
    # The longest first: what memory they need shows at once.
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    texts = [""] * len(prompts)
    step = _stepper(len(order)) if progress else lambda done: None
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=decoding.bf16):
            for start in range(0, len(order), decoding.batch_size):
                chosen = order[start : start + decoding.batch_size]
                found = _search(model, tokenizer, [prompts[n] for n in chosen], decoding, seq2seq)
                for n, text in zip(chosen, found, strict=True):
                    texts[n] = text
                step(start + len(chosen))
    finally:
        model.train(training)
    return texts


def generate_and_score(
    model: Any,
    tokenizer: Any,
    groups: Sequence[Group],
    task: Task,
    decoding: Decoding | None = None,
    out: Path | None = None,
    metrics: Sequence[str] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Generate a text for every group, write them to ``out`` (JSON lines), score them.

    Args:
        model, tokenizer, progress: see :func:`generate`. groups: see :func:`grouped`.
        decoding: default: the paper's for the task. metrics: names in :mod:`.text_metrics`; default: the task's.

    Returns:
        ``{"groups", "empty", "seconds", "decoding", "hypotheses": [text, ...], "scores": {"all": {metric: value}, ...},
        "absent": {metric: why}}``;
        :func:`.text_metrics.flat` makes one mapping of the scores.
    """
    decoding = decoding or decoding_for(task)
    started = time.perf_counter()
    texts = generate(model, tokenizer, [group.source for group in groups], decoding, progress)
    seconds = time.perf_counter() - started
    if out is not None:
        write_texts(out, groups, texts)
    if metrics is None and task.name in _TASKS:
        metrics = _TASKS[task.name][1]
    found = score_parts(texts, [group.refs for group in groups], [group.part for group in groups], metrics)
    return {
        "groups": len(groups),
        "empty": sum(not text for text in texts),
        "seconds": round(seconds, 3),
        "decoding": asdict(decoding),
        "hypotheses": texts,
        "scores": {part: scores.values for part, scores in found.items()},
        "absent": found["all"].absent,
    }


def generate_run(
    out: Path,
    split: str = "test",
    metrics: Sequence[str] | None = None,
    limit: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """:func:`generate_and_score` of the adapter in a run's folder, into its ``generated-<split>[-first-<limit>].jsonl``.

    Args:
        out: the ``--out`` of ``hiddenkey train``. split: ``test`` or ``dev``. limit: so many groups, the first.
        metrics: default: the task's. changes: of the task's :class:`Decoding`.
    """
    from .models import load_adapter, load_model, quiet_libraries
    from .run import load_splits

    quiet_libraries()
    config = folder.load_config(out)
    if not folder.put_back(out / folder.ADAPTER).is_dir():
        raise ConfigError(f"the run has no adapter yet (got {str(out)!r}); let it finish an epoch")
    task, splits = load_splits(config)
    rows = {"dev": splits.dev, "test": splits.test}.get(split)
    if not rows:
        raise ConfigError(f"the task has no such rows to generate for (got split {split!r}); use dev or test")
    model, tokenizer = load_model(config.model, task, config.seed)
    model = load_adapter(model, out / folder.ADAPTER)
    groups = grouped(rows, task)[:limit]
    # The texts of all sources, which took long, are not written over by those of a few.
    place = out / GENERATED.format(split=split if limit is None else f"{split}-first-{limit}")
    return {
        "split": split,
        "file": str(place),
        **generate_and_score(
            model, tokenizer, groups, task, decoding_for(task, **changes), place, metrics, progress=True
        ),
    }


def write_texts(path: Path, groups: Sequence[Group], texts: Sequence[str]) -> None:
    """One JSON line a group: source, refs, part, hypothesis."""
    lines = [{**asdict(group), "hypothesis": text} for group, text in zip(groups, texts, strict=True)]
    folder.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_texts(path: Path) -> tuple[list[Group], list[str]]:
    """What :func:`write_texts` wrote, to score it again."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    groups = [Group(line["source"], tuple(line["refs"]), line["part"]) for line in lines]
    return groups, [line["hypothesis"] for line in lines]


def _check_tokens(tokenizer: Any) -> None:
    for name, mend in (("pad", "set tokenizer.pad_token = tokenizer.eos_token"), ("eos", "set tokenizer.eos_token")):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ConfigError(f"generation needs a {name} token (got a tokenizer without one); {mend}")


def _prompts(model: Any, tokenizer: Any, sources: Sequence[str], decoding: Decoding, seq2seq: bool) -> list[list[int]]:
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    room = positions if seq2seq else positions - decoding.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"no room is left for a prompt (got max_new_tokens {decoding.max_new_tokens}, the model reads {positions}); "
            "lower max_new_tokens"
        )
    if seq2seq:
        return [list(tokenizer(source, truncation=True, max_length=room)["input_ids"]) for source in sources]
    # As in training, a long prompt loses its beginning.
    return [prompt_ids(source, tokenizer)[-room:] for source in sources]


def _search(model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding, seq2seq: bool) -> list[str]:
    import transformers

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        # On the left, so that every text goes on where its prompt ends.
        columns = slice(0, len(prompt)) if seq2seq else slice(width - len(prompt), width)
        ids[row, columns], mask[row, columns] = torch.tensor(prompt, dtype=ids.dtype), 1
    config = transformers.GenerationConfig(
        num_beams=decoding.beams,
        length_penalty=decoding.length_penalty,
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        use_cache=True,
        # What is not said here comes from the model's own generation config, which may forbid names of the source.
        early_stopping=False,
        min_length=0,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        num_return_sequences=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    known = 0 if seq2seq else width
    processors = [_without_repetition(decoding.no_repeat, known)] if decoding.no_repeat else []
    found = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=transformers.LogitsProcessorList(processors),
    )
    texts = tokenizer.batch_decode(found[:, known:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def _without_repetition(length: int, known: int) -> Any:
    """The rule of transformers reads the prompt too, and would forbid to copy a long name out of it."""
    import transformers

    rule = transformers.NoRepeatNGramLogitsProcessor(length)

    class OfTheText(transformers.LogitsProcessor):  # type: ignore[misc, name-defined]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return rule(input_ids[:, known:], scores)

    return OfTheText()


def _stepper(total: int) -> Callable[[int], None]:
    from .watch import Progress

    return Progress(total, 0).step
