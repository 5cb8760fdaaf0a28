"""``hiddenkey masks``: what element, column and span mean, as a picture of the very bits that training would draw."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from ..config import PATTERNS
from ..masks import SITES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A mask's coordinates, and where to show it."""
    parser.add_argument("--pattern", choices=PATTERNS, default="column", help="what is dropped (default: column)")
    parser.add_argument("--rate", type=float, default=0.1, help="probability of dropping (default: 0.1)")
    for name, text in (
        ("seed", "of all masks"),
        ("step", "the optimiser step"),
        ("branch", "the pass of a two-pass loss"),
        ("layer", "counted within its stack"),
    ):
        parser.add_argument(f"--{name}", type=int, default=0, help=f"{text} (default: 0)")
    parser.add_argument("--site", choices=list(SITES), default="attention", help="(default: attention)")
    parser.add_argument("--sample", type=int, nargs="+", default=[0], metavar="ID", help="sample ids (default: 0)")
    parser.add_argument("--heads", type=int, default=1, help="how many heads to show (default: 1)")
    parser.add_argument("--length", type=int, default=32, help="rows and columns (default: 32)")
    parser.add_argument("--out", metavar="FILE", help="write a PNG instead of blocks in the terminal")


def main(options: argparse.Namespace) -> int:
    """Draw the mask and show it."""
    from ..experiments import mask_picture
    from ..masks import MaskKey
    from .bench import check_writable

    key = MaskKey(options.seed, options.step, options.branch, options.layer, options.site)
    check_writable(options.out, ".png")
    keep = mask_picture.drawn(options.pattern, key, options.sample, options.length, options.rate, options.heads)
    title = mask_picture.title(options.pattern, key, options.rate, keep)
    if options.out is None:
        unicode = "utf" in (sys.stdout.encoding or "").lower()
        width = shutil.get_terminal_size().columns
        print(title, *mask_picture.blocks(keep, options.sample, width, unicode), sep="\n")
        return 0
    names = mask_picture.axis_names(options.pattern, options.site)
    mask_picture.draw(keep, options.sample, Path(options.out), names, title)
    print(f"{title}\n{options.out}")
    return 0
