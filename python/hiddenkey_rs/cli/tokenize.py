"""``hiddenkey tokenize``: text to a token store, which training maps into memory."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..loading.store import TokenStore

_SPLITS = ("train", "dev", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the text comes from, whose tokens it becomes, and where they go."""
    from ..experiments.tasks import TASKS

    parser.add_argument(
        "--model", required=True, metavar="NAME", help="whose tokenizer: a folder, a hub name, minilm or gpt2-tiny"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--file", metavar="FILE", help="own data: .jsonl, .json, .csv (plain or .gz), .parquet or .arrow"
    )
    source.add_argument("--task", choices=list(TASKS), metavar="TASK", help=f"a named task: {', '.join(TASKS)}")
    source.add_argument("--dataset", metavar="NAME", help="own data by its name in the datasets library")
    parser.add_argument("--data", metavar="FOLDER", help="folder that holds the task folders")
    parser.add_argument("--split", metavar="SPLIT", help="of a task or data set (default: train)")
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration name of --dataset")
    parser.add_argument("--text-fields", nargs="+", metavar="FIELD", help="one text field or a pair (default: text)")
    parser.add_argument("--label-field", metavar="FIELD", help="a number an example, kept as labels")
    parser.add_argument("--target-field", metavar="FIELD", help="text to learn after the text field (decoders)")
    parser.add_argument("--append-eos", action="store_true", help="end every example with the end-of-text token")
    parser.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="cut longer examples (default: the task's, or none)"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many work at once (default: one a processor)")
    parser.add_argument(
        "--out", required=True, metavar="FILE.arrow", help="the store; kept if it holds these tokens already"
    )


def main(options: argparse.Namespace) -> int:
    """Tokenise, or find that it was done, and say what came out."""
    from ..experiments.models import load_tokenizer, quiet_libraries
    from ..loading.encode import Encoder
    from ..loading.text import Tokenisation
    from ..loading.texts import Texts
    from .bench import check_writable

    out = Path(options.out)
    if out.suffix != ".arrow":
        raise ConfigError(f"a store is an Arrow file (got {options.out!r}); let the name end in .arrow")
    if options.file is not None and Path(options.file).resolve() == out.resolve():
        raise ConfigError(
            f"the store would replace the texts that it is made of (got {options.out!r}); choose another --out"
        )
    check_writable(options.out)
    quiet_libraries()
    start = time.perf_counter()
    texts = Texts.of(*_source(options))
    encoder = Encoder(load_tokenizer(options.model), len(texts.text_fields), options.append_eos, options.max_length)
    store, reused = Tokenisation(texts, encoder).keep(out, options.processes)
    print("\n".join(_report(store, reused, time.perf_counter() - start)))
    return 0


def _source(options: argparse.Namespace) -> tuple[Any, tuple[str, ...], str | None, str | None]:
    """(rows, text fields, label field, target field), and the task's ``--max-length`` where none was given."""
    from ..experiments import data, demo_data
    from ..experiments.tasks import TASKS

    source = next(name for name in ("file", "task", "dataset") if getattr(options, name) is not None)
    for name, owners in (("data", ("task",)), ("split", ("task", "dataset")), ("dataset_config", ("dataset",))):
        if getattr(options, name) is not None and source not in owners:
            flag, owned = name.replace("_", "-"), " or ".join(f"--{owner}" for owner in owners)
            raise ConfigError(
                f"--{flag} is of {owned} (got it beside --{source}, where it means nothing); leave it out"
            )
    if options.task is None:
        fields = tuple(options.text_fields or ("text",))
        return _own(options), fields, options.label_field, options.target_field
    for name in ("text_fields", "label_field", "target_field"):
        if getattr(options, name) is not None:
            raise ConfigError(f"a named task knows its fields (got --{name.replace('_', '-')}); leave it out")
    task = TASKS[options.task]
    splits = demo_data.demo_splits() if options.task == "demo" else data.task_splits(task, options.data)
    split = options.split or "train"
    rows = getattr(splits, split) if split in _SPLITS else None
    if rows is None:
        have = [name for name in _SPLITS if getattr(splits, name) is not None]
        raise ConfigError(f"the task has no such split (got {split!r}); it has {', '.join(have)}")
    options.max_length = task.max_length if options.max_length is None else options.max_length
    if task.kind == "lm":
        return rows, task.fields[:1], None, task.fields[1]
    return rows, task.fields, task.label, None


def _own(options: argparse.Namespace) -> Any:
    from ..experiments.data import read_rows
    from ..loading.arrow import load_hub
    from ..loading.stored import ARROW, PARQUET, read_file

    if options.file is not None:
        file = Path(options.file)
        # Tables are read column by column and a batch at a time; everything else is rows of Python objects.
        return read_file(file)[0] if file.suffix in ARROW + PARQUET else read_rows(file, options.label_field)
    return load_hub(options.dataset, options.dataset_config, split=options.split or "train")


def _report(store: TokenStore, reused: bool, seconds: float) -> list[str]:
    import numpy as np

    tokens = len(store.values)
    quantiles = np.quantile(store.lengths, [0, 0.1, 0.5, 0.9, 0.99, 1], method="inverted_cdf")
    named = zip(("least", "10 %", "half", "90 %", "99 %", "most"), quantiles, strict=True)
    columns = ", ".join(["input_ids", *store.token_columns, *store.row_columns])
    speed = "the file held these tokens already" if reused else f"{tokens / seconds:,.0f} tokens/s"
    return [
        f"{store.path}: {len(store):,} rows, {tokens:,} tokens; {columns}",
        "tokens a row: " + ", ".join(f"{name} {count}" for name, count in named),
        f"{seconds:.2f} s, {speed}",
        f"digest {store.digest}",
    ]
