"""Texts of a finished trial, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..generation import Group, decoding_for, generate_and_score
from ..tasks import Task
from ..text_metrics import flat
from .watching import rounded


def generate_texts(model: Any, tokenizer: Any, groups: Sequence[Group], task: Task, bf16: bool) -> dict[str, Any]:
    """Generate as the paper does for the task: ``figures``, and what else a line's ``texts`` holds.

    A metric whose package or program is missing is named in ``absent``, with the reason.
    """
    found = generate_and_score(model, tokenizer, groups, task, decoding_for(task, bf16=bf16))
    return {"figures": rounded(flat(found.pop("scores"))), **found}
