"""What a store of tokens was made from, as a short string."""

from __future__ import annotations

import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .encode import Encoder
from .texts import Texts

_VERSION = "hiddenkey-tokens-1"  # another one as soon as the same input gives other tokens


def fingerprint(texts: Texts, encoder: Encoder) -> str:
    """32 hexadecimal digits of the texts and labels, the tokenizer, the choices and the tokenizers' versions."""
    fields = {"texts": len(texts.text_fields), "target": texts.target_field is not None}
    choices = {"append_eos": encoder.append_eos, "max_length": encoder.max_length}
    versions = {name: version(name) for name in ("transformers", "tokenizers")}
    content = hashlib.blake2b(digest_size=16)
    content.update(_plain([_VERSION, fields, choices, versions, _tokenizer_state(encoder.tokenizer)]))
    for batch in texts.batches():
        for column in [*batch.texts, *([] if batch.targets is None else [batch.targets])]:
            content.update(np.fromiter(map(len, column), np.int64, len(column)).data)
            content.update("".join(column).encode())
        if batch.labels is not None:
            content.update(batch.labels.dtype.str.encode())
            content.update(batch.labels.data)
    return content.hexdigest()


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Everything that a tokenizer's answers depend on: a fast one's own description, else the files that it is kept in."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).iterdir() if path.is_file())
            inside: Any = [(path.name, hashlib.blake2b(path.read_bytes()).hexdigest()) for path in files]
    else:
        # How the last call cut and padded is no property of the tokenizer.
        inside = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    named = ("special_tokens_map", "truncation_side", "model_input_names", "split_special_tokens")
    settings = {name: repr(getattr(tokenizer, name, None)) for name in named}
    return {"class": type(tokenizer).__qualname__, "inside": inside, **settings}


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
