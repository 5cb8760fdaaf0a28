"""The plans in experiments/: they load, cost what they say, and can show what they are for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hiddenkey_rs.experiments.sweep.plan import Plan
from hiddenkey_rs.experiments.sweep.reading import load_plan

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = sorted(FOLDER.glob("small/*.yaml")) + sorted(FOLDER.glob("full/*.yaml"))
# To be tried out, or of decoders, which take long to generate: too few seeds for any p below .05.
SHOW_NOTHING = {"small/quick", "small/generation", "small/llama", "small/webnlg"}


def name(file: Path) -> str:
    return str(file.relative_to(FOLDER).with_suffix(""))


def runs(plan: Plan) -> int:
    winners = {(task, method): 0 for task in plan.tasks for method in plan.methods}
    return len({trial.id for trial in [*plan.search(), *plan.final(winners), *plan.along_curves(winners)]})


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_kept_plan_is_what_its_head_says(file: Path) -> None:
    plan = load_plan(file, "data")
    head = file.read_text().partition("\nname:")[0].replace("\n# ", " ")
    said = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:runs,|in all,)", head)]
    if name(file) != "small/quick":
        assert said == [runs(plan)]
    least = plan.least_p()
    assert least is not None
    assert (least < 0.05) is (name(file) not in SHOW_NOTHING)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_method_searches_a_setting_twice(file: Path) -> None:
    plan = load_plan(file, "data")
    for task in plan.tasks:
        for method, entry in plan.methods.items():
            trials = [plan.trial("search", task, method, number, 0) for number in range(len(entry.settings))]
            assert len({repr((trial.config, trial.controls)) for trial in trials}) == len(trials), (task, method)


def test_a_curve_over_ranks_does_not_vary_the_scale() -> None:
    for file in FILES:
        plan = load_plan(file, "data")
        ranked = any(curve.vary == "rank" for curve in plan.curves.values())
        searched = any("rank" in setting for method in plan.methods.values() for setting in method.settings)
        assert not (ranked or searched) or "alpha" not in plan.base, name(file)


def test_results_at_hand_are_the_kept_plans() -> None:
    """Seeds and curves may be added to a plan that has results, nothing else may change."""
    for folder in FOLDER.glob("results/*"):
        digest = (folder / "plan.digest").read_text().strip()
        plan = load_plan(folder / "plan.yaml", "data")
        assert plan.digest == digest
        kept = load_plan(FOLDER / "small" / f"{folder.name}.yaml", "data")
        assert (kept.digest, kept.comparisons, kept.measure) == (digest, plan.comparisons, plan.measure)
        assert kept.protocol.final_seeds == plan.protocol.final_seeds
