"""A plan: tasks, methods with equally many settings each, and the protocol that chooses between them.

The file (YAML)::

    name: small
    protocol:
      select_rows: 500          # rows that choose the setting and the epoch, cut from the training rows left over
      select_by: metric         # the task's first metric; or: loss, or a metric's name
      report_rows: 1000         # at most so many development rows are reported, the same for all (default: all)
      report_test: true         # labelled test rows, where a task has them, join the development rows (default: false)
      looks: 4                  # at rows held back, evenly over a run's epochs (default: after every epoch)
      generate: 200             # data to text: final runs generate for so many sources (default: all; 0: none)
      search_seeds: [0, 1]      # every method x setting x task x these
      final_seeds: [100, 101]   # the chosen setting of every method x task x these
    base: {model: minilm, rank: 16, lr: 1.0e-3, epochs: 8}      # fields of a run, see hiddenkey train --help
    tasks:
      mrpc-1000: {task: mrpc, train_size: 1000}
    methods:
      none: {preset: none, settings: [{lr_scale: 0.5}, {}, {lr_scale: 2.0}]}    # lr_scale: times the task's learning rate
      hiddenkey: {preset: hiddenkey, settings: &rates [{rate: 0.05}, {rate: 0.1}, {rate: 0.2}]}
      hiddenkey-minus: {preset: hiddenkey-minus, settings: *rates}
    comparisons:                                                # the family of tests, fixed beforehand
      baselines: [none]                                         # each of these with each of
      against: [hiddenkey]
      pairs: [[hiddenkey, hiddenkey-minus]]                     # and these, each with its own baseline
      measure: metric                                           # at the chosen epoch; or: loss, or bleu (else the metric)
    curves:
      ranks: {vary: rank, values: [4, 16, 64], methods: [none, hiddenkey], tasks: [mrpc-1000], seeds: [0, 1, 2]}
"""  # noqa: D214, D405, D411

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ...errors import ConfigError
from ..run_config import RunConfig
from ..tasks import TASKS, Task

SEARCH, FINAL, CURVE = "search", "final", "grid"


@dataclass(frozen=True)
class Protocol:
    """How settings and epochs are chosen, and by how many seeds."""

    select_rows: int = 500
    select_from: str = "train"
    select_by: str = "metric"
    report_rows: int | None = None
    report_test: bool = False
    looks: int | None = None
    generate: int | None = None
    search_seeds: tuple[int, ...] = (0,)
    final_seeds: tuple[int, ...] = (100, 101, 102)


@dataclass(frozen=True)
class Controls:
    """What a trial may have beside a run's own choices: dropout of other kinds, to compare with."""

    stock_rate: float | None = None
    """The model's own attention and hidden dropout, switched on at this rate."""
    rank_dropout: float | None = None
    """Dropout on the rank axis of every adapter (DropLoRA): one draw a forward pass, shared by all rows."""

    def __post_init__(self) -> None:
        for name, rate in (("stock_rate", self.stock_rate), ("rank_dropout", self.rank_dropout)):
            if rate is not None and (isinstance(rate, (bool, str)) or not 0 <= rate < 1):
                raise ConfigError(f"{name} must be a rate in [0, 1) (got {rate!r}); use one such as 0.1")


@dataclass(frozen=True)
class Trial:
    """One training run of a plan. ``id`` names it: task/method/setting/seed/stage. ``number``: of the method's setting."""

    id: str
    stage: str
    task: str
    method: str
    setting: Mapping[str, Any]
    number: int
    seed: int
    train_size: int | None
    config: RunConfig
    controls: Controls
    protocol: Protocol


@dataclass(frozen=True)
class Method:
    """A method: what is common to its trials, and the settings that are searched."""

    common: Mapping[str, Any]
    settings: tuple[Mapping[str, Any], ...]
    rate_field: str
    final_seeds: int | None


@dataclass(frozen=True)
class Curve:
    """One value varied, everything else as the search chose it."""

    vary: str
    values: tuple[Any, ...]
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]


Winners = Mapping[tuple[str, str], int]
"""(task, method) -> the number of the chosen setting."""


@dataclass(frozen=True)
class Plan:
    """A checked plan, see :func:`.reading.load_plan`. Everything that it could ever run has been built once."""

    name: str
    protocol: Protocol
    base: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Method]
    baselines: tuple[str, ...]
    comparisons: tuple[tuple[str, str], ...]
    """(method, its baseline) of every test, on every task."""
    measure: str
    """What the family is tested on, at the chosen epoch: ``metric`` (the task's own), ``loss``, or ``bleu`` of generated texts
    (of other tasks their metric)."""
    curves: Mapping[str, Curve]
    data: str | None
    digest: str

    @property
    def fixed(self) -> Mapping[str, tuple[Any, ...]]:
        """What a folder with final runs keeps, by its key in the file: the digest covers neither seeds nor family."""
        return {
            "comparisons": tuple(sorted(f"{method} - {baseline}" for method, baseline in self.comparisons)),
            "measure": (self.measure,),
            "search_seeds": self.protocol.search_seeds,
            "final_seeds": self.protocol.final_seeds,
        }

    def search(self) -> list[Trial]:
        """Every method x setting x task x search seed."""
        return [
            self.trial(SEARCH, task, method, number, seed)
            for task in self.tasks
            for seed in self.protocol.search_seeds
            for method, entry in self.methods.items()
            for number in range(len(entry.settings))
        ]

    def final(self, winners: Winners) -> list[Trial]:
        """The chosen settings on the final seeds, seed by seed, so that methods stay comparable at any time."""
        found = []
        for number, seed in enumerate(self.protocol.final_seeds):
            for (task, method), setting in winners.items():
                most = self.methods[method].final_seeds
                if most is None or number < most:
                    found.append(self.trial(FINAL, task, method, setting, seed))
        return found

    def along_curves(self, winners: Winners) -> list[Trial]:
        """Trials of all curves whose settings are chosen."""
        return [
            self.trial(CURVE, task, method, winners[task, method], seed, (curve.vary, value))
            for curve in self.curves.values()
            for seed in curve.seeds
            for task in curve.tasks
            for method in curve.methods
            if (task, method) in winners
            for value in curve.values
        ]

    def least_p(self) -> float | None:
        """The smallest p that a comparison of this plan can reach, after Holm, whatever comes out; None without any.

        That of n seeds' sign flips is 2^(1-n), and the smallest of a family is multiplied by its size.
        """
        seeds = [min(self._pairs(method), self._pairs(baseline)) for method, baseline in self.comparisons]
        return min(1.0, len(seeds) * len(self.tasks) * 2.0 ** (1 - max(seeds))) if seeds else None

    def _pairs(self, method: str) -> int:
        return len(self.protocol.final_seeds[: self.methods[method].final_seeds])

    def task_of(self, key: str) -> Task:
        """The task behind a key of ``tasks``."""
        return TASKS[self.tasks[key]["task"]]

    def cells(self) -> Iterator[tuple[str, str, int]]:
        """(task, method, number of a setting) of everything that is searched."""
        for task in self.tasks:
            for method, entry in self.methods.items():
                for number in range(len(entry.settings)):
                    yield task, method, number

    def trial(
        self, stage: str, task: str, method: str, number: int, seed: int, varied: tuple[str, Any] | None = None
    ) -> Trial:
        """One trial; ``varied``: (field, value) on top of the setting."""
        entry, place = self.methods[method], str(number)
        setting = dict(entry.settings[number])
        if varied is not None:
            name = entry.rate_field if varied[0] == "rate" else varied[0]
            setting[name] = varied[1]
            place = varied_place(*varied)
        merged = {**self.base, **self.tasks[task], **entry.common, **setting}
        train_size = merged.pop("train_size", None)
        scale = merged.pop("lr_scale", 1.0)
        controls = Controls(**{f.name: merged.pop(f.name) for f in fields(Controls) if f.name in merged})
        data = None if merged["task"] == "demo" else self.data
        config = RunConfig.from_dict({**merged, "data": data, "seed": seed})
        if scale != 1.0:
            config = replace(config, lr=config.lr * scale)
        name = f"{task}/{method}/{place}/{seed}/{stage}"
        return Trial(name, stage, task, method, setting, number, seed, train_size, config, controls, self.protocol)


def varied_place(vary: str, value: Any) -> str:
    """The setting's part of the id of a curve's trial."""
    return f"{vary}={value:g}" if isinstance(value, float) else f"{vary}={value}"
