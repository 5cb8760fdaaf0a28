"""A plan's file, checked: whatever is wrong with it is found before anything runs, and named with its line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import ConfigError, HiddenKeyError
from ...serialise import choice
from ..run_config import RunConfig
from ..tasks import TASKS
from .located import Located, Place
from .plan import CURVE, SEARCH, Controls, Curve, Method, Plan, Protocol, Trial, varied_place

_TOP = ("name", "protocol", "base", "tasks", "methods", "comparisons", "curves")
_CURVE = ("vary", "values", "methods", "tasks", "seeds")
_METHOD = ("settings", "rate_field", "final_seeds")
# What a run knows and a plan decides by itself, or that changes no result.
_OWN = (
    *("task", "data", "train_file", "dev_file", "test_file", "dataset", "dataset_config", "kind", "text_fields"),
    *("label_field", "train_size", "seed", "out", "threads"),
)
_QUIET = ("log_masks", "save_steps", "max_steps", "log_every", "dev_rows")
# What a trial, a single process with batches of rows, would leave undone: refused, as nobody would notice.
_UNDONE = ("fsdp", "token_budget", "loader")
# What plans may set.
_VARIED = (
    *(f.name for f in fields(RunConfig) if f.name not in _OWN + _QUIET + _UNDONE),
    *(f.name for f in fields(Controls)),
    "lr_scale",
)


def load_plan(path: str | Path, data: str | None = None) -> Plan:
    """Read a plan (see :mod:`.plan` for the file); ``data`` is the folder of task folders.

    Raises:
        ConfigError: unknown keys, an empty grid, methods with unequal budgets, a metric that does not fit, values that no
            run can have; always with the file's line.
    """
    return _Reader(Located(path), data).plan()


class _Reader:
    """Checks a plan's parts, each complaint with its line."""

    def __init__(self, source: Located, data: str | None) -> None:
        self.source, self.data = source, data

    def plan(self) -> Plan:
        values = self._mapping((), _TOP)
        for name in ("tasks", "methods"):
            if not values.get(name):
                raise self.source.error((name,), f"a plan needs {name}, and this one has none", "name at least one")
        name = values.get("name", self.source.path.stem)
        protocol = self._protocol()
        self._run_fields(("base",))
        tasks = {key: self._task(("tasks", key)) for key in self._mapping(("tasks",))}
        self._selection_fits(protocol, tasks)
        methods = {key: self._method(("methods", key), protocol) for key in self._mapping(("methods",))}
        self._equal_budgets(methods)
        baselines, comparisons = self._comparisons(methods)
        measure = self._measure(protocol, tasks)
        curves = {key: self._curve(("curves", key), methods, tasks) for key in self._mapping(("curves",))}
        digest = _digest(values)
        base = dict(values.get("base") or {})
        plan = Plan(
            str(name), protocol, base, tasks, methods, baselines, comparisons, measure, curves, self.data, digest
        )
        self._build_all(plan)
        return plan

    def _at(self, place: Place) -> Any:
        value: Any = self.source.values
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else value[key]  # type: ignore[index]
        return value

    def _mapping(self, place: Place, allowed: tuple[str, ...] | None = None) -> Mapping[str, Any]:
        value = self._at(place)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.source.error(place, f"{_spell(place)} is no mapping", "write KEY: VALUE pairs")
        for key in value:
            if not isinstance(key, str) or "/" in key or not key.strip():
                what = f"{_spell(place)} has a key {key!r}"
                raise self.source.error(
                    place, what, "write keys as words without /, in quotes where YAML reads them otherwise"
                )
            if allowed is not None and key not in allowed:
                raise self._unknown((*place, key), allowed)
        return value

    def _unknown(self, place: Place, allowed: tuple[str, ...]) -> ConfigError:
        try:
            choice(place[-1], allowed, f"key in {_spell(place[:-1])}")
        except ConfigError as error:
            what, _, mend = str(error).partition("; ")
            return self.source.error(place, f"{what.partition(' (got')[0]} {place[-1]!r}", mend)
        raise AssertionError("only called for unknown keys")

    def _protocol(self) -> Protocol:
        place: Place = ("protocol",)
        given = dict(self._mapping(place, tuple(f.name for f in fields(Protocol))))
        for name in ("search_seeds", "final_seeds"):
            if name in given:
                given[name] = self._seeds((*place, name))
        if given.get("select_from", "train") not in ("train", "dev"):
            what = f"unknown select_from {given['select_from']!r}"
            raise self.source.error((*place, "select_from"), what, "use train or dev")
        for name, least in (("select_rows", 1), ("report_rows", 1), ("looks", 1), ("generate", 0)):
            count = given.get(name, 1)
            if type(count) is not int or count < least:
                raise self.source.error((*place, name), f"{name} is {count!r}", f"give a whole number from {least} up")
        if type(given.get("report_test", False)) is not bool:
            what = f"report_test is {given['report_test']!r}"
            raise self.source.error((*place, "report_test"), what, "write true or false")
        protocol = Protocol(**given)
        twice = sorted(set(protocol.search_seeds) & set(protocol.final_seeds))
        if twice:
            what = f"final_seeds holds {twice[0]}, a seed that settings are searched on"
            at = "final_seeds" if "final_seeds" in given else "search_seeds"
            raise self.source.error((*place, at), what, "give final runs seeds of their own")
        return protocol

    def _selection_fits(self, protocol: Protocol, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        by = protocol.select_by
        for key, task in tasks.items():
            if TASKS[task["task"]].kind == "lm" and protocol.select_from == "train":
                what = f"training rows of {key} share their sources, so none of them is held back from the others"
                raise self.source.error(("tasks", key), what, "write select_from: dev")
            known = ("metric", "loss", *TASKS[task["task"]].metrics)
            if by not in known:
                what = f"the metric {by!r} does not fit the task {key}"
                raise self.source.error(("protocol", "select_by"), what, f"use one of {', '.join(known)}")

    def _seeds(self, place: Place) -> tuple[int, ...]:
        value = self._at(place)
        whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
        if not whole or not value or len(set(value)) < len(value):
            raise self.source.error(place, f"{_spell(place)} is no list of different seeds", "write [0, 1, 2]")
        return tuple(value)

    def _run_fields(self, place: Place, also: tuple[str, ...] = ()) -> dict[str, Any]:
        for key in self._mapping(place):
            self._check_done((*place, key), key)
        return dict(self._mapping(place, (*_VARIED, *also)))

    def _check_done(self, place: Place, field: str) -> None:
        if field in _UNDONE:
            what = f"{field} has no part in a sweep, whose trials take batches of rows on one process"
            raise self.source.error(place, what, "leave it out, or use hiddenkey train")

    def _task(self, place: Place) -> dict[str, Any]:
        found = self._run_fields(place, ("task", "train_size"))
        if found.get("task") not in TASKS:
            raise self.source.error(
                (*place, "task"), f"unknown task {found.get('task')!r}", f"use one of {', '.join(TASKS)}"
            )
        size = found.get("train_size")
        if size is not None and (type(size) is not int or size < 1):
            raise self.source.error((*place, "train_size"), f"train_size is {size!r}", "give a number of rows")
        return found

    def _method(self, place: Place, protocol: Protocol) -> Method:
        found = self._run_fields(place, _METHOD)
        settings = found.pop("settings", [{}])
        if not isinstance(settings, list) or not settings:
            raise self.source.error((*place, "settings"), "a method has no settings", "write a list, [{}] for one")
        if "settings" in self._at(place):
            for number in range(len(settings)):
                self._run_fields((*place, "settings", number))
        seeds, most = found.pop("final_seeds", None), len(protocol.final_seeds)
        if seeds is not None and (type(seeds) is not int or not 1 <= seeds <= most):
            mend = f"give a whole number from 1 to {most}, as many as protocol.final_seeds has"
            raise self.source.error((*place, "final_seeds"), f"final_seeds is {seeds!r}", mend)
        return Method(
            common=found,
            rate_field=found.pop("rate_field", "rate"),
            final_seeds=seeds,
            settings=tuple(setting or {} for setting in settings),
        )

    def _equal_budgets(self, methods: Mapping[str, Method]) -> None:
        counts = {key: len(method.settings) for key, method in methods.items()}
        first = next(iter(counts))
        for key, count in counts.items():
            if count != counts[first]:
                raise self.source.error(
                    ("methods", key, "settings"),
                    f"{key} searches {count} settings and {first} {counts[first]}",
                    "every method gets the same budget",
                )

    def _comparisons(self, methods: Mapping[str, Method]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        """The baselines, and (method, baseline) of every comparison."""
        given = self._mapping(("comparisons",), ("baselines", "against", "pairs", "measure"))
        sides = {name: self._keys(("comparisons", name), methods) for name in ("baselines", "against") if name in given}
        if len(sides) == 1 and not ("baselines" in sides and given.get("pairs")):
            only = next(iter(sides))
            what = f"comparisons have {only} and nothing to compare them with"
            raise self.source.error(("comparisons", only), what, "give both baselines and against, or pairs")
        baselines = sides.get("baselines", ())
        found = [(method, base) for method in sides.get("against", ()) for base in baselines if method != base]
        pairs = given.get("pairs") or []
        for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
            place: Place = ("comparisons", "pairs", number) if isinstance(pairs, list) else ("comparisons", "pairs")
            if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
                raise self.source.error(place, f"{pair!r} is no pair", "write [METHOD, BASELINE]")
            method, base = self._keys(place, methods)
            found.append((method, base))
        return baselines, tuple(dict.fromkeys(found))

    def _measure(self, protocol: Protocol, tasks: Mapping[str, Mapping[str, Any]]) -> str:
        measure = self._mapping(("comparisons",)).get("measure", "metric")
        place: Place = ("comparisons", "measure")
        if measure not in ("metric", "loss", "bleu"):
            what = f"unknown measure {measure!r}"
            raise self.source.error(place, what, "use metric (the task's own), loss, or bleu")
        if measure == "bleu" and (
            protocol.generate == 0 or not any(TASKS[t["task"]].kind == "lm" for t in tasks.values())
        ):
            what = "the measure bleu is of texts, and this plan generates none"
            raise self.source.error(place, what, "use metric or loss, or generate texts of a data-to-text task")
        return str(measure)

    def _keys(self, place: Place, known: Mapping[str, Any]) -> tuple[str, ...]:
        value = self._at(place)
        for key in value if isinstance(value, list) else [value]:
            if key not in known:
                raise self._unknown((*place, str(key)), tuple(known))
        return tuple(value if isinstance(value, list) else [value])

    def _curve(self, place: Place, methods: Mapping[str, Any], tasks: Mapping[str, Any]) -> Curve:
        found = self._mapping(place, _CURVE)
        if "vary" not in found or not isinstance(found.get("values"), list) or not found["values"]:
            raise self.source.error(place, "a curve varies nothing", "give vary: FIELD and values: [...]")
        vary = str(found["vary"])
        self._check_done((*place, "vary"), vary)
        if vary not in (*_VARIED, "train_size"):
            raise self.source.error(
                (*place, "vary"), f"a curve cannot vary {vary!r}", "vary a field that a setting may have"
            )
        for number, value in enumerate(found["values"]):
            if "/" in varied_place(vary, value):
                what = f"a curve's runs are named by their values, and {value!r} has a /"
                raise self.source.error((*place, "values", number), what, "make methods of such values")
        return Curve(
            vary=vary,
            values=tuple(found["values"]),
            methods=self._keys((*place, "methods"), methods) if "methods" in found else tuple(methods),
            tasks=self._keys((*place, "tasks"), tasks) if "tasks" in found else tuple(tasks),
            seeds=self._seeds((*place, "seeds")) if "seeds" in found else (0,),
        )

    def _build_all(self, plan: Plan) -> None:
        """Every trial once: a rate out of range is found now, with the line of its setting, and not in three hours."""
        for task, method, number in plan.cells():
            place: Place = ("methods", method, "settings", number)
            self._build(place, partial(plan.trial, SEARCH, task, method, number, 0))
        for key, curve in plan.curves.items():
            for task, method, number in plan.cells():
                if task in curve.tasks and method in curve.methods:
                    for at, value in enumerate(curve.values):
                        make = partial(plan.trial, CURVE, task, method, number, 0, (curve.vary, value))
                        self._build(("curves", key, "values", at), make)

    def _build(self, place: Place, make: Callable[[], Trial]) -> None:
        try:
            trial = make()
            trial.config.check()
            trial.config.drops()
        except (HiddenKeyError, TypeError) as error:
            what, _, mend = str(error).partition("; ")
            raise self.source.error(place, what, mend or "mend the value") from None


def _digest(values: Mapping[str, Any]) -> str:
    """Of everything that decides what a trial does; seeds and curves may be added to a plan that has results."""
    seeds = ("search_seeds", "final_seeds")
    fixed = {name: values.get(name) for name in ("name", "base", "tasks", "methods")}
    fixed["protocol"] = {name: value for name, value in (values.get("protocol") or {}).items() if name not in seeds}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _spell(place: Place) -> str:
    return ".".join(map(str, place)) or "the plan"
