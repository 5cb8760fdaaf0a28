"""Rows of text to token ids, and lists of them to padded batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import DataError
from .data import Row
from .tasks import Task

logger = logging.getLogger(__name__)

Example = dict[str, Any]
IGNORED = -100
_TABLES = ("position_embeddings", "embed_positions", "wpe")


def longest_row(asked: int | None, task: Task, model: Any) -> int:
    """Tokens that a row may have: as many as ``asked`` for, or the task's number, but not more than the model has places for.

    Models that turn or bias attention have places without end. That fewer are left than were asked for is logged.
    """
    room = _places(model)
    if asked is None:
        known = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
        return min([task.max_length, *(limit for limit in (room, known) if limit)])
    if room is None or asked <= room:
        return asked
    logger.warning("the model has places for %d tokens: rows keep so many and not %d", room, asked)
    return room


def _places(model: Any) -> int | None:
    """Positions that a text can take in the model's tables of them; ``None``: it has none."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # RoBERTa's kind counts from behind the padding's entry, BART's and OPT's from an offset.
            first = 0 if module.padding_idx is None or not name.endswith(_TABLES[0]) else module.padding_idx + 1
            found.append(module.num_embeddings - getattr(module, "offset", first))
    return min(found, default=None)


def tokenise(rows: list[Row], task: Task, tokenizer: Any, max_length: int, encoder_decoder: bool) -> list[Example]:
    """One mapping of model arguments a row, unpadded, in the rows' order. Long inputs are truncated to ``max_length``."""
    if task.kind != "lm":
        return _classified(rows, task, tokenizer, max_length)
    source, target = task.fields
    if encoder_decoder:
        return [_seq2seq(row[source], row[target], tokenizer, max_length) for row in rows]
    return [_causal(row[source], row[target], tokenizer, max_length, row["__line__"]) for row in rows]


def _classified(rows: list[Row], task: Task, tokenizer: Any, max_length: int) -> list[Example]:
    columns = [[row[field] for row in rows] for field in task.fields]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    labels = [row[str(task.label)] for row in rows]
    return [{**{name: encoded[name][n] for name in encoded}, "labels": labels[n]} for n in range(len(rows))]


def _causal(source: str, target: str, tokenizer: Any, max_length: int, line: int) -> Example:
    """Prompt, target, end of text; only the target carries loss. A long prompt loses its beginning, never its target."""
    prompt = prompt_ids(source, tokenizer)
    answer = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if len(answer) >= max_length:
        raise DataError(
            f"a target does not fit (got {len(answer)} tokens in line {line}); raise --max-length ({max_length})"
        )
    prompt = prompt[-(max_length - len(answer)) :]
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + answer}


def prompt_ids(source: str, tokenizer: Any) -> list[int]:
    """What stands before a causal model's answer: the source and a line's end, without an end of text."""
    ids = list(tokenizer(source + "\n")["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _seq2seq(source: str, target: str, tokenizer: Any, max_length: int) -> Example:
    encoded = tokenizer(source, truncation=True, max_length=max_length)
    labels = tokenizer(text_target=target, truncation=True, max_length=max_length)["input_ids"]
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


def collator(tokenizer: Any, kind: str) -> Callable[[list[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """Pads to the longest example of a batch, on the tokenizer's side; labels of tokens with -100."""
    left = tokenizer.padding_side == "left"
    fill = {"input_ids": tokenizer.pad_token_id or 0, "labels": IGNORED}
    label_type = torch.float32 if kind == "regression" else torch.int64

    def collate(examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        for name in examples[0]:
            values = [example[name] for example in examples]
            if isinstance(values[0], list):
                batch[name] = _padded(values, fill.get(name, 0), left)
            else:
                batch[name] = torch.tensor(values, dtype=label_type)
        return batch

    return collate


def _padded(values: list[list[int]], fill: int, left: bool) -> torch.Tensor:
    width = max(map(len, values))
    padded = torch.full((len(values), width), fill, dtype=torch.int64)
    for row, ids in zip(padded, values, strict=True):
        row[width - len(ids) :] = torch.tensor(ids) if left else row[width - len(ids) :]
        if not left:
            row[: len(ids)] = torch.tensor(ids)
    return padded
