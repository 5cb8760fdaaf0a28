"""``hiddenkey eval``: the figures of a run's adapter, computed anew."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run's folder, and where to write."""
    parser.add_argument("--run", required=True, metavar="DIR", help="the --out of a training run")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")


def main(options: argparse.Namespace) -> int:
    """Evaluate and print a table beside what training wrote."""
    from ..experiments import folder
    from ..experiments.report import table
    from ..experiments.run import evaluate_run

    out = Path(options.run)
    found = evaluate_run(out)
    written = json.loads((out / folder.METRICS).read_text()) if (out / folder.METRICS).is_file() else {}
    rows = []
    for part in ("dev", "test"):
        if part in found:
            rows.append({"rows": part, "figures": "now", **found[part]})
            if written.get(part):
                rows.append({"rows": part, "figures": "in metrics.json", **written[part]})
    print(table(rows))
    if options.json:
        folder.write_json(Path(options.json), found)
    return 0
