"""Processes that work for the loading."""

from __future__ import annotations

from ..errors import HiddenKeyError


class LostWorkerError(HiddenKeyError):
    """A process that made batches or tokens died: killed, as a rule, because memory ran out."""

    exit_code = 1
