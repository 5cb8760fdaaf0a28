"""The tasks that runs know by name, and the user's own."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("classification", "regression", "lm")


@dataclass(frozen=True)
class Task:
    """What a task's rows hold and how it is scored.

    ``metrics``: names in :mod:`.metrics`; the first one chooses the best epoch. ``lower_is_better`` says which way.
    ``max_length``: tokens, the default of ``--max-length``. For ``kind="lm"`` the fields are (source, target).
    ``classes``: their names in the rows, in the order of their numbers; without them the rows hold the numbers.
    ``hub``: (name, configuration) in the ``datasets`` library, where no data folder holds the task; ``hub_fields``: what
    ``fields`` are called there, if otherwise.
    ``origin``: a field besides ``fields`` that rows with much the same text have in common; see :attr:`unit`.
    """

    name: str
    folder: str
    fields: tuple[str, ...]
    kind: str
    num_labels: int
    metrics: tuple[str, ...]
    label: str | None = "label"
    lower_is_better: bool = False
    max_length: int = 128
    classes: tuple[str, ...] = ()
    hub: tuple[str, str | None] | None = None
    hub_fields: tuple[str, ...] = ()
    origin: str | None = None

    @property
    def metric(self) -> str:
        """The metric that chooses the best epoch."""
        return self.metrics[0]

    @property
    def source(self) -> str | None:
        """The field that a text is generated for, which several rows may have in common."""
        return self.fields[0] if self.kind == "lm" else None

    @property
    def unit(self) -> str | None:
        """The field whose rows stay together where held-back rows are divided: else a paraphrase stood on either side."""
        return self.origin or self.source


_PAIR = ("sentence1", "sentence2")
_TEXT = ("source", "target")
_LM = ("perplexity", "token_accuracy")
_QUESTION = ("question", "sentence")
_GLUE = "nyu-mll/glue"
# The test set has five more categories, which nothing could be learned about.
_CATEGORIES = (
    *("Airport", "Astronaut", "Building", "City", "ComicsCharacter"),
    *("Food", "Monument", "SportsTeam", "University", "WrittenWork"),
)


def _sentence(name: str, folder: str, metrics: tuple[str, ...]) -> Task:
    """One of GLUE's tasks of one sentence."""
    return Task(name, folder, ("sentence1",), "classification", 2, metrics, hub=(_GLUE, name), hub_fields=("sentence",))


TASKS = {
    task.name: task
    for task in (
        Task("mrpc", "MRPC", _PAIR, "classification", 2, ("accuracy", "f1"), hub=(_GLUE, "mrpc")),
        Task("rte", "RTE", _PAIR, "classification", 2, ("accuracy",), max_length=256, hub=(_GLUE, "rte")),
        Task("stsb", "STS-B", _PAIR, "regression", 1, ("pearson", "spearman"), hub=(_GLUE, "stsb")),
        _sentence("sst2", "SST-2", ("accuracy",)),
        _sentence("cola", "CoLA", ("matthews", "accuracy")),
        Task("qnli", "QNLI", _QUESTION, "classification", 2, ("accuracy",), max_length=256, hub=(_GLUE, "qnli")),
        Task("e2e", "E2E", _TEXT, "lm", 0, _LM, label=None, lower_is_better=True, max_length=512),
        Task("webnlg", "WebNLG", _TEXT, "lm", 0, _LM, label=None, lower_is_better=True, max_length=512),
        Task(
            "webnlg-category",
            "WebNLG",
            ("target",),
            "classification",
            len(_CATEGORIES),
            ("accuracy", "f1"),
            label="category",
            classes=_CATEGORIES,
            origin="source",
        ),
        Task("demo", "", _PAIR, "classification", 2, ("accuracy", "f1"), max_length=64),
    )
}

FOLDERS = {task.folder for task in TASKS.values() if task.folder}
"""What a folder of data holds: one or several of these."""


def own_task(name: str, fields: tuple[str, ...], kind: str, label: str, num_labels: int) -> Task:
    """A task made of the user's files."""
    metrics = {"classification": ("accuracy", "f1"), "regression": ("pearson", "spearman"), "lm": _LM}[kind]
    if kind == "lm":
        return Task(name, "", fields, kind, 0, metrics, label=None, lower_is_better=True, max_length=512)
    return Task(name, "", fields, kind, num_labels, metrics, label=label)
