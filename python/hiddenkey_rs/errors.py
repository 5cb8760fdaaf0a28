"""The library's errors: one hierarchy, so that ``except HiddenKeyError`` catches everything it raises on purpose.

Every message has the form ``WHAT (got VALUE); HOW TO MEND IT``.
"""

from typing import Any


def shown(value: Any) -> str:
    """``repr(value)`` for a message; of an integer that is too long for one, its size."""
    try:
        return repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


class HiddenKeyError(Exception):
    """Base class of every error that this library raises on purpose."""

    exit_code = 2
    """What the command line exits with: 2 for bad input, 1 where the work itself failed."""


class ConfigError(HiddenKeyError, ValueError):
    """A setting or an argument is outside its range, unknown, or contradicts another one."""


class UnsupportedModelError(HiddenKeyError, TypeError):
    """The model's family, or the way it is set up, offers no place to attach to."""


class DataError(HiddenKeyError, ValueError):
    """Input data (rows, labels, files, sample ids) is missing, malformed or does not fit the batch."""


class StateError(HiddenKeyError, RuntimeError):
    """An operation came at the wrong time: attached twice, no active step, nothing to resume from."""
