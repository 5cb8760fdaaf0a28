"""Where a figure comes from: versions, processor, commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("hiddenkey_rs", "numpy", "torch")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name as its maker gives it, or as near as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:  # not a Linux
        pass
    return platform.processor() or platform.machine()


def weights_digest(folder: Path) -> str:
    """Of the weights in a model's folder: their files' names, sizes and first 64 MiB. Empty where there are none."""
    found = hashlib.sha256()
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    for file in files:
        found.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as weights:
            found.update(weights.read(64 << 20))
    return found.hexdigest()[:16] if files else ""


def commit() -> str | None:
    """The commit that this package is checked out at, ``-dirty`` behind it if files differ; None outside a checkout."""
    here = Path(__file__).resolve()
    # Installed into an environment inside somebody else's repository, git would answer for that one: ask for this file.
    if _git(here.parent, "ls-files", "--error-unmatch", "--", "../__init__.py") is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
