"""Tables in the paper's layout: its numbers beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sweep.plan import SEARCH, Plan
from . import paper
from .measures import Measure, at, values
from .render import NONE, Table
from .studies import Found, Study
from .tables import spread_text

_OTHER_KINDS = ("rank", "weight_decay", "epochs", "lora_dropout", "stock_rate", "rank_dropout")
"""What makes a method of the plan a control and none of the paper's."""


_SHARED = ("none", "hiddenkey-minus")
"""What several of the paper's tables measure their own methods by."""


def methods_of(plan: Plan) -> dict[str, str]:
    """The paper's methods in a plan: the paper's name -> the plan's. A control with the same drops is none of them."""
    found: dict[str, str] = {}
    for name, method in plan.methods.items():
        trial = plan.trial(SEARCH, next(iter(plan.tasks)), name, 0, 0)
        dropped = {"lora_dropout", "stock_rate", "rank_dropout"} & set().union(*method.settings)
        known = paper.name_of(trial.config.drops())
        if known is not None and not dropped and not set(_OTHER_KINDS) & set(method.common):
            found.setdefault(known, name)
    return found


def paper_tables(study: Study) -> list[Table]:
    """Those of the paper's tables of which the plan has a method that is none of another's, and those of generated texts."""
    held, found = methods_of(study.plan), []
    tasks = [task for task in study.plan.tasks if study.plan.task_of(task).kind != "lm"]
    for layout in paper.LAYOUTS if tasks else ():
        if any(name in held for name in layout.methods if name not in _SHARED):
            found.append(_scores(study, layout, tasks, held))
    found += [_texts(study, task, held) for task in study.plan.tasks if study.plan.task_of(task).kind == "lm"]
    return [table for table in found if table is not None]


def _scores(study: Study, layout: paper.Layout, tasks: list[str], held: dict[str, str]) -> Table | None:
    model = str(study.plan.base.get("model", "minilm"))
    columns, rows = ["method"], []
    names = {task: study.plan.task_of(task).name for task in tasks}
    known = {task for task in tasks if any(paper.score(method, names[task], model) for method in layout.methods)}
    if not known:  # with no figure of the paper's it would be beside nothing
        return None
    for task in tasks:
        columns += [f"{task}, ours", *([f"{names[task]}, paper"] if task in known else [])]
    for name in layout.methods:
        if name not in held:
            continue
        cells = []
        for task in tasks:
            measure = Measure(study.plan.task_of(task).metric)
            cells.append(spread_text(measure, values(measure, study.finals(task, held[name]))))
            if task in known:
                cells.append(_printed(paper.score(name, names[task], model)))
        rows.append((name if name == held[name] else f"{name} ({held[name]})", *cells))
    theirs = "LLaMA2-7B" if paper.is_llama(model) else "RoBERTa-large"
    caption = (
        f"Ours: {model}, mean (standard deviation) over final seeds, setting and epoch chosen off the reported rows. The "
        f"paper's: {theirs} on whole training sets, median of 5 seeds (standard deviation), every cell the best of 6 to 8 "
        "rates on the reported rows themselves. Levels are not comparable; the order of methods is."
    )
    return Table(f"paper-{layout.key}", f"As in the paper: {layout.title}", caption, tuple(columns), tuple(rows))


def _printed(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return NONE
    return f"{found[0]:.2f}" if found[1] is None else f"{found[0]:.2f} ({found[1]:.2f})"


def _texts(study: Study, task: str, held: dict[str, str]) -> Table | None:
    """A decoder's task: the metrics of generated texts that runs have at their chosen epoch."""
    runs = {method: [i for i in study.finals(task, method) if i.done] for method in study.plan.methods}
    figures = dict.fromkeys(name for items in runs.values() for i in items for name in at(i.line, "chosen")["report"])
    names = [name for name in figures if name not in ("loss", "token_accuracy", "perplexity")]
    if not names:
        return None
    model = str(study.plan.base.get("model", "minilm"))
    theirs = {method: paper.texts(known, study.plan.task_of(task).name, model) for known, method in held.items()}
    columns, rows = ["method"], []
    for name in names:
        columns += [f"{name}, ours", f"{name}, paper"] if any(name in entry for entry in theirs.values()) else [name]
    for method, items in runs.items():
        cells = []
        for name in names:
            measure = Measure(name)
            cells.append(spread_text(measure, values(measure, items)))
            if any(name in entry for entry in theirs.values()):
                value = theirs.get(method, {}).get(name)
                cells.append(NONE if value is None else f"{value:g}")
        rows.append((method, *cells))
    caption = (
        f"Ours: {model}, mean (standard deviation) over final seeds, of texts generated at the chosen epoch for "
        f"{_sources([item for items in runs.values() for item in items])}. The paper's: "
        f"{'LLaMA2-7B' if paper.is_llama(model) else 'GPT2-Medium'}, mean of 3 seeds, on the whole test split; its ROUGE-L "
        f"is the challenge's script's.{_lacking([item for items in runs.values() for item in items])}"
    )
    return Table(f"paper-{task}", f"As in the paper: {task}, generated texts", caption, tuple(columns), tuple(rows))


def _sources(runs: list[Found]) -> str:
    """What texts were generated for, as far as lines say it: ``200 of 1862 sources of the test split``."""
    return " or ".join(dict.fromkeys(_drawn(item.line.texts) for item in runs)) or "no sources"


def _lacking(runs: list[Found]) -> str:
    """Texts that are empty, and metrics that could not be computed, with the reason."""
    empty = sum(item.line.texts.get("empty", 0) for item in runs)
    absent = {name: why for item in runs for name, why in item.line.texts.get("absent", {}).items()}
    said = [f"{name} is absent ({why})" for name, why in absent.items()]
    return " ".join(["", *([f"{empty} texts are empty."] if empty else []), *([f"{'; '.join(said)}."] if said else [])])


def _drawn(texts: Mapping[str, Any]) -> str:
    if "groups" not in texts:
        return "an unrecorded number of sources"
    of = f" of {texts['of']}" if texts.get("of", texts["groups"]) != texts["groups"] else ""
    split = f" of the {texts['split']} split" if texts.get("split") else ""
    return f"{texts['groups']}{of} sources{split}"
