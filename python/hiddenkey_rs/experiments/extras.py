"""Packages that only experiments need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import HiddenKeyError


def extra(module: str, group: str = "train") -> Any:
    """Import ``module``; where it is missing, an error that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HiddenKeyError(
            f"this needs the package {module.split('.')[0]!r} (got {error}); install hiddenkey_rs with its extra [{group}]"
        ) from None
