"""Texts of a finished trial, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import HiddenKeyError
from ..generation import Group, decoding_for, generate_and_score
from ..tasks import Task
from ..text_metrics import flat
from .watching import rounded


def generate_texts(model: Any, tokenizer: Any, groups: Sequence[Group], task: Task, bf16: bool) -> dict[str, Any]:
    """Generate as the paper does for the task: ``figures``, and what else a line's ``texts`` holds.

    A metric whose package or program is missing is named in ``absent``, with the reason; so are all texts where there is
    no memory for them, or nothing in them: the training that they came of is kept.
    """
    try:
        found = generate_and_score(model, tokenizer, groups, task, decoding_for(task, bf16=bf16))
    except (HiddenKeyError, torch.OutOfMemoryError) as error:
        return {"figures": {}, "absent": {"texts": " ".join(str(error).split())}}
    return {"figures": rounded(flat(found.pop("scores"))), **found}
