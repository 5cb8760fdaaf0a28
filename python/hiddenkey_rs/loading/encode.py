"""One batch of texts to flat arrays of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from ..batches.checks import check_integer
from ..errors import ConfigError, DataError
from .arrow import Array
from .texts import TextBatch

IGNORED = -100
"""The label of a token that carries no loss."""


@dataclass(frozen=True)
class Encoded:
    """Some examples. ``ids``: (tokens,) int32; ``lengths``: (rows,) int64; the columns as a store has them."""

    ids: Array
    lengths: Array
    token_columns: dict[str, Array] = field(default_factory=dict)
    row_columns: dict[str, Array] = field(default_factory=dict)


class Encoder:
    """A tokenizer and what is wanted of it; calling it encodes a batch. It pickles, so that processes can share the work.

    Args are those of :func:`~hiddenkey_rs.loading.text.tokenize`; ``texts``: how many text fields there are.
    """

    def __init__(self, tokenizer: Any, texts: int, append_eos: bool, max_length: int | None) -> None:
        if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
            raise ConfigError(
                f"a tokenizer of transformers is needed (got {type(tokenizer).__name__}); see AutoTokenizer"
            )
        if max_length is not None:
            max_length = check_integer(
                max_length, "max_length", 1 + append_eos, 1 << 20, "it counts an example's tokens"
            )
        self.tokenizer, self.append_eos, self.max_length = tokenizer, append_eos, max_length
        # Whether token types mean anything shows in any example: what they depend on, special tokens, is in all of them.
        self.typed = any(self._ids([["a"]] * texts, specials=True).get("token_type_ids", [[]])[0])
        if self.typed and append_eos:
            raise ConfigError(
                "an end of text is for decoders (got append_eos with a tokenizer of token types); leave it out"
            )

    def __call__(self, batch: TextBatch) -> Encoded:
        """The tokens of ``batch``; a :class:`DataError` names an example that comes to nothing or does not fit."""
        encoded = self._plain(batch) if batch.targets is None else self._targeted(batch, batch.targets)
        empty = np.flatnonzero(encoded.lengths == 0)
        if len(empty):
            raise DataError(f"a text comes to no tokens (got {batch.place(int(empty[0]))}); drop the row")
        if batch.labels is not None:
            encoded.row_columns["labels"] = batch.labels
        return encoded

    def _plain(self, batch: TextBatch) -> Encoded:
        room = None if self.max_length is None else self.max_length - self.append_eos
        found = self._ids(batch.texts, specials=True, max_length=room)
        rows = found["input_ids"]
        if self.append_eos:
            end = [self._eos()]
            rows = [[*ids, *end] if ids[-1:] != end else ids for ids in rows]
        encoded = _flat(rows)
        if self.typed:
            encoded.token_columns["token_type_ids"] = _flat(found["token_type_ids"]).ids
        return encoded

    def _targeted(self, batch: TextBatch, targets: list[str]) -> Encoded:
        """Text, newline, target, end of text; only the target carries loss."""
        eos = self._eos()
        prompts = self._ids([[text + "\n" for text in batch.texts[0]]], specials=True)["input_ids"]
        answers = self._ids([targets], specials=False)["input_ids"]
        rows, labels = [], []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            answer = [*answer, eos]
            if prompt[-1:] == [eos]:
                prompt = prompt[:-1]
            if self.max_length is not None:
                if len(answer) >= self.max_length:
                    raise DataError(
                        f"a target does not fit (got {len(answer)} tokens in {batch.place(row)}); raise max_length "
                        f"({self.max_length})"
                    )
                prompt = prompt[len(answer) - self.max_length :]
            rows.append(prompt + answer)
            labels.append([IGNORED] * len(prompt) + answer)
        encoded = _flat(rows)
        encoded.token_columns["labels"] = _flat(labels).ids
        return encoded

    def _ids(self, texts: list[list[str]], *, specials: bool, max_length: int | None = None) -> Any:
        return self.tokenizer(
            *texts,
            add_special_tokens=specials,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            verbose=False,
        )

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ConfigError(
                f"the tokenizer has no end-of-text token (got {type(self.tokenizer).__name__}); set its eos_token"
            )
        return int(eos)


def _flat(rows: list[list[int]]) -> Encoded:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return Encoded(np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths)
