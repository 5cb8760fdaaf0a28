"""``hiddenkey eval``: the figures of a run's adapter, computed anew, and texts that it generates."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .bench import check_writable

Found = tuple[dict[str, Any], Callable[[], None]]
"""Figures, and what prints them: after they are written, as whoever reads may have gone."""

_DECODING = {
    "beams": "beams of the search (default: 10)",
    "length_penalty": "power of the length that a text's log-probability is divided by (default: the paper's)",
    "no_repeat": "forbid repeated N-grams of tokens, 0 allows them (default: 4)",
    "max_new_tokens": "longest generated text, in tokens (default: 128)",
    "batch_size": "sources of a batch (default: 16)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run's folder, what to generate, and where to write."""
    parser.add_argument("--run", required=True, metavar="DIR", help="the --out of a training run")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    group = parser.add_argument_group("generation", "of data-to-text tasks, by beam search")
    group.add_argument(
        "--generate",
        choices=("test", "dev"),
        help="generate a text for every source of these rows into the run's generated-*.jsonl, and score them",
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N sources (default: all)")
    for name, text in _DECODING.items():
        kind = float if name == "length_penalty" else int
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)


def main(options: argparse.Namespace) -> int:
    """Evaluate and print a table beside what training wrote; or generate and print the scores."""
    from ..experiments import folder

    check_writable(options.json)
    if not options.generate:
        given = next((name for name in ("limit", *_DECODING) if getattr(options, name) is not None), None)
        if given is not None:
            flag = given.replace("_", "-")
            raise ConfigError(
                f"--{flag} is about generated texts (got it without --generate); give --generate test or dev"
            )
    found, show = _generated(options) if options.generate else _evaluated(Path(options.run))
    if options.json:
        folder.write_json(Path(options.json), found)
    show()
    return 0


def _evaluated(out: Path) -> Found:
    from ..experiments import folder
    from ..experiments.report import table
    from ..experiments.run import evaluate_run

    found = evaluate_run(out)
    written = folder.read_json(out / folder.METRICS) if (out / folder.METRICS).is_file() else {}
    rows = []
    for part in ("dev", "test"):
        if part in found:
            rows.append({"rows": part, "figures": "now", **found[part]})
            if written.get(part):
                rows.append({"rows": part, "figures": "in metrics.json", **written[part]})
    return found, lambda: print(table(rows))


def _generated(options: argparse.Namespace) -> Found:
    from ..experiments.generation import generate_run
    from ..experiments.report import table

    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be at least 1 (got {options.limit}); leave it out for all sources")
    given = {name: getattr(options, name) for name in _DECODING if getattr(options, name) is not None}
    found = generate_run(Path(options.run), options.generate, limit=options.limit, **given)

    def show() -> None:
        print(table([{"rows": part, **scores} for part, scores in found["scores"].items()]))
        for name, reason in found["absent"].items():
            print(f"{name} is absent: {reason}")
        print(f"{found['groups']} texts ({found['empty']} empty) in {found['seconds']:.0f} s: {found['file']}")

    return found, show
