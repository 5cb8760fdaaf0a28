"""Vector files: plain text, one case a line, read by every implementation."""

from pathlib import Path


def read(name: str) -> list[list[str]]:
    """The lines of a file, split at blanks; comments left out."""
    lines = (Path(__file__).parent / name).read_text().splitlines()
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]
