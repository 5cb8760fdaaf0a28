"""``hiddenkey report``: what a sweep's results say, as one page with its tables, pictures and tests."""

from __future__ import annotations

import argparse

from ..errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folders of results, and what is written."""
    parser.add_argument("folders", nargs="+", metavar="DIR", help="results of hiddenkey sweep; several for one report")
    parser.add_argument("--out", metavar="DIR", help="the report's folder: index.html, report.md, pictures, tables")
    parser.add_argument(
        "--data", metavar="DIR", help="folder with paper_fig4.json, to draw the paper's curves behind ours"
    )
    parser.add_argument("--markdown", metavar="FILE", help="write its parts <!-- report NAME --> anew (RESULTS.md)")


def main(options: argparse.Namespace) -> int:
    """Write, and say the outcome."""
    from ..experiments.evidence.writing import PAGE, write_report

    if options.out is None and options.markdown is None:
        raise ConfigError("a report goes somewhere (got neither --out nor --markdown); give --out DIR")
    for sentence in write_report(options.folders, options.out, options.data, options.markdown):
        print(sentence)
    if options.out is not None:
        print(f"page: {options.out.rstrip('/')}/{PAGE}")
    return 0
