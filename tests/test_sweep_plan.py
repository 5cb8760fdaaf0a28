"""Plans: what is wrong is found before anything runs, with its line; trials are what the protocol says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hiddenkey_rs as hk
from hiddenkey_rs.experiments.data import Splits
from hiddenkey_rs.experiments.sweep.plan import Protocol
from hiddenkey_rs.experiments.sweep.reading import load_plan
from hiddenkey_rs.experiments.sweep.selection import chosen_epoch, drawn_sources, score, split_rows
from hiddenkey_rs.experiments.sweep.watching import is_look
from hiddenkey_rs.experiments.tasks import TASKS

PLAN = """\
name: p
protocol: {select_rows: 20, search_seeds: [0, 1], final_seeds: [5, 6]}
base: {model: gpt2-tiny, epochs: 1}
tasks:
  small: {task: demo, train_size: 30}
  large: {task: demo, train_size: 60, epochs: 2}
methods:
  none: {preset: none, settings: [{lr: 1.0e-3}, {lr: 2.0e-3}]}
  dropped: {preset: none, rate_field: lora_dropout, final_seeds: 1, settings: [{lora_dropout: 0.1}, {lora_dropout: 0.2}]}
  stock: {preset: none, settings: [{stock_rate: 0.1}, {rank_dropout: 0.2}]}
comparisons: {baselines: [none], against: [dropped]}
curves:
  rates: {vary: rate, values: [0.3, 0.4], methods: [dropped], tasks: [small], seeds: [0]}
"""


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    return str(file)


def test_every_method_gets_every_seed_of_every_task(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, PLAN))
    trials = plan.search()
    assert len(trials) == len({trial.id for trial in trials}) == 2 * 3 * 2 * 2
    assert trials[0].id == "small/none/0/0/search"
    by_id = {trial.id: trial for trial in trials}
    one = by_id["large/dropped/1/1/search"]
    assert (one.config.lora_dropout, one.config.seed, one.config.epochs, one.train_size) == (0.2, 1, 2, 60)
    assert by_id["small/stock/0/0/search"].controls.stock_rate == 0.1
    assert by_id["small/stock/1/0/search"].controls.rank_dropout == 0.2
    assert by_id["small/none/1/0/search"].config.lr == 2e-3


def test_finals_and_curves_follow_the_winners(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, PLAN))
    chosen = {("small", "none"): 1, ("small", "dropped"): 0}
    # `dropped` asks for one final seed only; seeds come first, so that methods can be compared at any time
    assert [trial.id for trial in plan.final(chosen)] == [
        "small/none/1/5/final",
        "small/dropped/0/5/final",
        "small/none/1/6/final",
    ]
    curve = plan.along_curves(chosen)
    assert [trial.id for trial in curve] == ["small/dropped/rate=0.3/0/grid", "small/dropped/rate=0.4/0/grid"]
    assert [trial.config.lora_dropout for trial in curve] == [0.3, 0.4]


def test_a_curve_may_vary_the_scale_of_the_learning_rate(tmp_path: Path) -> None:
    text = PLAN.replace("vary: rate, values: [0.3, 0.4]", "vary: lr_scale, values: [0.5, 2.0]")
    curve = load_plan(write(tmp_path, text)).along_curves({("small", "dropped"): 1})
    assert [trial.id for trial in curve] == ["small/dropped/lr_scale=0.5/0/grid", "small/dropped/lr_scale=2/0/grid"]
    assert curve[1].config.lr == 4 * curve[0].config.lr
    assert curve[0].config.lora_dropout == 0.2


@pytest.mark.parametrize(("seeds", "least"), [(range(5, 11), 2 * 2**-5), (range(5, 12), 2 * 2**-6), (range(5, 6), 1.0)])
def test_the_smallest_p_of_a_family_is_known_beforehand(seeds: range, least: float, tmp_path: Path) -> None:
    text = PLAN.replace("final_seeds: [5, 6]", f"final_seeds: {list(seeds)}").replace("final_seeds: 1, ", "")
    assert load_plan(write(tmp_path, text)).least_p() == least  # one comparison on two tasks
    fewer = text.replace("rate_field", "final_seeds: 1, rate_field")
    assert load_plan(write(tmp_path, fewer)).least_p() == 1.0
    none = text.replace("comparisons: {baselines: [none], against: [dropped]}\n", "")
    assert load_plan(write(tmp_path, none)).least_p() is None


def test_comparisons_are_a_product_and_single_pairs(tmp_path: Path) -> None:
    text = PLAN.replace("against: [dropped]", "against: [dropped, none], pairs: [[stock, dropped], [dropped, none]]")
    plan = load_plan(write(tmp_path, text))
    assert plan.baselines == ("none",)
    assert plan.comparisons == (("dropped", "none"), ("stock", "dropped"))


def test_a_setting_may_scale_the_learning_rate_of_its_task(tmp_path: Path) -> None:
    text = PLAN.replace("epochs: 2}", "epochs: 2, lr: 4.0e-3}").replace("{lr: 2.0e-3}", "{lr_scale: 0.5}")
    plan = load_plan(write(tmp_path, text))
    rates = {trial.task: trial.config.lr for trial in plan.search() if "/none/1/" in trial.id}
    assert rates["large"] == 2e-3
    assert rates["small"] == plan.trial("search", "small", "stock", 0, 0).config.lr / 2


def test_seeds_and_curves_may_be_added_to_a_plan_with_results(tmp_path: Path) -> None:
    digest = load_plan(write(tmp_path, PLAN)).digest
    more = PLAN.replace("final_seeds: [5, 6]", "final_seeds: [5, 6, 7]").partition("curves:")[0]
    assert load_plan(write(tmp_path, more)).digest == digest
    for old, new in (
        ("1.0e-3", "3.0e-3"),
        ("train_size: 30", "train_size: 31"),
        ("select_rows: 20", "select_rows: 21"),
    ):
        assert load_plan(write(tmp_path, PLAN.replace(old, new))).digest != digest


BAD = [
    ("name: p", "nmae: p", r"unknown key in the plan 'nmae' \(got .*line 1\); did you mean 'name'"),
    ("select_rows: 20", "select_rows: 0", r"select_rows is 0 \(got .*line 2\)"),
    ("search_seeds: [0, 1]", "search_seeds: [0, 0]", r"protocol.search_seeds is no list of different seeds .*line 2"),
    (
        "final_seeds: [5, 6]",
        "final_seeds: [5, 1]",
        r"final_seeds holds 1, a seed that settings .*line 2\); give final runs",
    ),
    ("search_seeds: [0, 1], final_seeds: [5, 6]", "search_seeds: [7, 100]", r"final_seeds holds 100.*line 2"),
    ("search_seeds: [0, 1]", "select_by: matthews", r"the metric 'matthews' does not fit the task small .*line 2"),
    ("search_seeds: [0, 1]", "looks: 0", r"looks is 0 .*line 2\); give a whole number from 1 up"),
    ("search_seeds: [0, 1]", "generate: -1", r"generate is -1 .*line 2"),
    ("search_seeds: [0, 1]", "report_test: 1", r"report_test is 1 .*line 2\); write true or false"),
    (
        "task: demo, train_size: 30",
        "task: e2e, train_size: 30",
        r"share their sources.*line 5\); write select_from: dev",
    ),
    ("search_seeds: [0, 1]", "select_from: test", r"unknown select_from 'test' .*line 2"),
    ("epochs: 1}", "epoch: 1}", r"unknown key in base 'epoch' .*line 3\); did you mean 'epochs'"),
    ("task: demo, train_size: 30", "task: dmeo", r"unknown task 'dmeo' .*line 5"),
    ("train_size: 30", "train_size: 0", r"train_size is 0 .*line 5"),
    ("epochs: 1}", "fsdp: true}", r"fsdp has no part in a sweep.*line 3\); leave it out"),
    ("epochs: 2}", "token_budget: 99}", r"token_budget has no part in a sweep.*line 6"),
    ("{lr: 2.0e-3}", "{loader: hiddenkey}", r"loader has no part in a sweep.*line 8"),
    ("vary: rate, values: [0.3, 0.4]", "vary: fsdp, values: [true]", r"fsdp has no part in a sweep.*line 13"),
    ("epochs: 1}", "train_size: 9}", r"unknown key in base 'train_size' .*line 3"),
    ("final_seeds: 1", 'final_seeds: "1"', r"final_seeds is '1' \(got .*line 9\); give a whole number from 1 to 2"),
    ("final_seeds: 1", "final_seeds: -1", r"final_seeds is -1 .*line 9"),
    ("final_seeds: 1", "final_seeds: 0", r"final_seeds is 0 .*line 9"),
    ("final_seeds: 1", "final_seeds: 3", r"final_seeds is 3 .*line 9\); .* from 1 to 2, as many as protocol"),
    ("{stock_rate: 0.1}, ", "", r"stock searches 1 settings and none 2 .*line 10.*same budget"),
    ("settings: [{stock_rate: 0.1}, {rank_dropout: 0.2}]", "settings: []", r"a method has no settings .*line 10"),
    ("{lora_dropout: 0.2}", "{lora_dropout: 2}", r"lora_dropout must lie in \[0, 1\) \(got 2 in .*line 9\)"),
    ("preset: none, rate_field", "preset: nnoe, rate_field", r"unknown preset \(got 'nnoe' in .*line 9\)"),
    ("baselines: [none]", "baselines: [nnoe]", r"unknown key in comparisons.baselines 'nnoe' .*line 11"),
    ("against: [dropped]", "pairs: [[none]]", r"\['none'\] is no pair .*line 11\); write \[METHOD, BASELINE\]"),
    ("against: [dropped]", "pairs: [[none, nnoe]]", r"unknown key in comparisons.pairs.0 'nnoe' .*line 11"),
    ("values: [0.3, 0.4]", "values: []", r"a curve varies nothing .*line 13"),
    ("values: [0.3, 0.4]", "values: [0.3, 4.0]", r"lora_dropout must lie in .*line 13"),
    ("vary: rate, values", "vary: max_steps, values", r"a curve cannot vary 'max_steps' .*line 13"),
    ("vary: rate, values", "vary: seed, values", r"a curve cannot vary 'seed' .*line 13"),
    ("vary: rate, values", "vary: task, values", r"a curve cannot vary 'task' .*line 13"),
    ("vary: rate, values: [0.3", "vary: model, values: [a/b", r"named by their values, and 'a/b' has a / .*line 13"),
    ("{stock_rate: 0.1}", "{stock_rate: 1.5}", r"stock_rate must be a rate in \[0, 1\) \(got 1.5 in .*line 10"),
    ("{rank_dropout: 0.2}", "{rank_dropout: yes}", r"rank_dropout must be a rate in \[0, 1\) \(got True in .*line 10"),
    ("baselines: [none], ", "", r"comparisons have against and nothing to compare them with .*line 11"),
    (", against: [dropped]", "", r"comparisons have baselines and nothing to compare .*line 11\); give both"),
    ("lr: 2.0e-3", "? {RATE: 1} : 2.0e-3", r"a key is no word \(got a mapping in .*line 8\)"),
    ("base: {", "name: twice\nbase: {", r"a key stands twice \(got 'name' in .*line 3\)"),
    ("name: p", "name: [", r"the plan is no YAML"),
    ("  dropped: {", "  drop/ped: {", r"methods has a key 'drop/ped' .*; write keys as words"),
    ("  dropped: {", "  off: {", r"methods has a key False .*; write keys as words"),
    ("base: {", "base: {1: 2, ", r"base has a key 1 .*line 3\); write keys"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_a_bad_plan_is_refused_with_its_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in PLAN
    with pytest.raises(hk.ConfigError, match=message):
        load_plan(write(tmp_path, PLAN.replace(old, new, 1)))


@pytest.mark.parametrize("part", ["tasks", "methods"])
def test_an_empty_grid_is_refused(part: str, tmp_path: Path) -> None:
    head, _, rest = PLAN.partition(f"{part}:\n")
    rest = rest[rest.index("\n" + ("methods" if part == "tasks" else "comparisons")) :]
    with pytest.raises(hk.ConfigError, match=f"a plan needs {part}, and this one has none"):
        load_plan(write(tmp_path, head + f"{part}: {{}}" + rest))


def test_a_missing_plan_says_so() -> None:
    with pytest.raises(hk.ConfigError, match=r"cannot be read \(got 'nowhere.yaml': No such file"):
        load_plan("nowhere.yaml")


def test_a_plan_of_another_encoding_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_bytes("# \xe9\n".encode("latin-1") + PLAN.encode())
    with pytest.raises(hk.ConfigError, match=r"the plan cannot be read \(got '.*plan.yaml': 'utf-8' codec"):
        load_plan(tmp_path / "plan.yaml")


ROWS = [{"n": n} for n in range(100)]
DEV = [{"n": -n} for n in range(1, 41)]
TEST = [{"n": 1000 + n} for n in range(30)]
SPLITS = Splits(ROWS, DEV, TEST)


def test_subsets_are_nested_and_share_nothing_with_what_is_chosen_on() -> None:
    protocol = Protocol(select_rows=20)
    numbers = {}
    for size in (10, 40, 80):
        fit, choose, report = split_rows(SPLITS, size, protocol, seed=3)
        numbers[size] = [row["n"] for row in fit]
        assert len(fit) == size
        assert len(choose) == 20
        assert not {row["n"] for row in fit} & {row["n"] for row in choose}
        assert report == DEV
    assert numbers[80][:40] == numbers[40]
    assert numbers[40][:10] == numbers[10]
    other, _, _ = split_rows(SPLITS, 10, protocol, seed=4)
    assert [row["n"] for row in other] != numbers[10]
    whole, choose, _ = split_rows(SPLITS, None, protocol, seed=3)
    assert len(whole) == 80
    _, _, few = split_rows(SPLITS, 10, Protocol(select_rows=20, report_rows=7), seed=3)
    _, _, same = split_rows(SPLITS, 10, Protocol(select_rows=20, report_rows=7), seed=4)
    assert few == same
    assert len(few) == 7
    with_test = Protocol(select_rows=20, report_test=True)
    assert split_rows(SPLITS, 10, with_test, seed=3)[2] == DEV + TEST
    assert split_rows(Splits(ROWS, DEV, None), 10, with_test, seed=3)[2] == DEV
    # What results were had with: the rows of a seed are these for good, whatever else a task's rows have in common.
    known = np.random.default_rng([3, 1]).permutation(100).tolist()
    fit, choose, _ = split_rows(SPLITS, 10, protocol, seed=3, unit="source")
    assert [row["n"] for row in fit] == known[:10]
    assert [row["n"] for row in choose] == known[80:]
    with pytest.raises(hk.DataError, match=r"too few training rows .*got 100, wanted 81 and 20"):
        split_rows(SPLITS, 81, protocol, seed=3)


def test_halves_of_the_development_rows_are_the_same_for_all_seeds() -> None:
    protocol = Protocol(select_rows=500, select_from="dev")
    _, choose, report = split_rows(SPLITS, 10, protocol, seed=0)
    _, again, same = split_rows(SPLITS, 10, protocol, seed=9)
    assert choose == again
    assert report == same
    assert len(choose) == len(report) == 20
    assert not {row["n"] for row in choose} & {row["n"] for row in report}
    shared = Splits(ROWS, [{"n": n, "source": n // 3} for n in range(40)], None)
    _, choose, report = split_rows(shared, 10, protocol, seed=0, unit="source")
    assert not {row["source"] for row in choose} & {row["source"] for row in report}, "a source was divided"
    assert len(choose) + len(report) == 40
    few = Protocol(select_rows=500, select_from="dev", report_rows=7)
    _, choose, report = split_rows(SPLITS, 10, few, seed=0)
    assert choose == again, "fewer reported rows take none of those that are chosen on"
    assert len(report) == 7
    assert all(row in same for row in report)
    with_test = Protocol(select_rows=500, select_from="dev", report_test=True)
    assert split_rows(SPLITS, 10, with_test, seed=0)[1:] == (again, same + TEST)
    with pytest.raises(hk.DataError, match=r"too few training rows \(got train_size 101 of 100\); lower train_size"):
        split_rows(SPLITS, 101, protocol, seed=0)


def test_rows_with_a_source_in_common_stay_together() -> None:
    assert TASKS["webnlg-category"].unit == "source"
    assert TASKS["webnlg-category"].source is None  # no texts are generated for it
    assert TASKS["e2e"].unit == TASKS["webnlg"].unit == "source"
    assert TASKS["mrpc"].unit is None


def test_sources_are_drawn_and_not_the_first() -> None:
    drawn = drawn_sources(range(100), 10)
    assert drawn == drawn_sources(range(100), 10) == sorted(set(drawn))
    assert len(drawn) == 10
    assert max(drawn) > 50
    assert drawn_sources(range(5), None) == drawn_sources(range(5), 9) == [0, 1, 2, 3, 4]
    assert drawn_sources(range(5), 0) == []


@pytest.mark.parametrize(
    ("epochs", "looks", "at"), [(3, None, [1, 2, 3]), (24, 4, [6, 12, 18, 24]), (5, 4, [2, 3, 4, 5]), (2, 9, [1, 2])]
)
def test_looks_are_spread_over_a_run_and_end_with_it(epochs: int, looks: int | None, at: list[int]) -> None:
    assert [epoch for epoch in range(1, epochs + 1) if is_look(epoch, epochs, looks)] == at


def test_the_epoch_is_the_best_on_the_selection_rows() -> None:
    def entry(accuracy: float, loss: float) -> dict[str, dict[str, float]]:
        return {"select": {"accuracy": accuracy, "loss": loss}, "report": {"accuracy": 1 - accuracy, "loss": 0.0}}

    history = [entry(0.5, 0.6), entry(0.7, 0.5), entry(0.7, 0.4), entry(0.7, 0.4), entry(0.6, 0.1)]
    assert chosen_epoch(history, TASKS["demo"], "metric") == 2
    assert chosen_epoch(history, TASKS["demo"], "loss") == 4
    assert score({"perplexity": 3.0, "loss": 1.0}, TASKS["e2e"], "metric") == -3.0
    assert np.isfinite(score({"accuracy": 0.5, "loss": 1.0}, TASKS["demo"], "accuracy"))
