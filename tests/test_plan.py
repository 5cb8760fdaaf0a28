"""A step planned ahead is the masks that its parts would be drawn as: bits and counts of every layer, site and branch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiddenkey_rs as hk
from hiddenkey_rs import ConfigError, DataError, MaskKey, masks, plan_step
from hiddenkey_rs.config import rate_for, resolve_layers
from reference import masks as reference

PATTERNS = ("element", "column", "span")
RATES = st.sampled_from([0.0, 2**-16, 0.1, 0.5, 0.9, 1 - 2**-16])
CONSISTENCY = [
    None,
    *(hk.Consistency(kind) for kind in ("kl", "js", "jensen-shannon", "mse")),
    hk.Consistency("kl", gradient="both"),
]


def branches(config: hk.HiddenKeyConfig) -> int:
    return 1 if config.consistency is None or config.consistency.kind == "js" else 2


@settings(max_examples=80, deadline=None)
@given(
    attention=st.none() | st.builds(hk.AttentionDrop, pattern=st.sampled_from(PATTERNS), rate=RATES),
    hidden=st.none() | st.builds(hk.HiddenDrop, pattern=st.sampled_from(PATTERNS), rate=RATES),
    rate_pattern=st.sampled_from([{}, {r"layers\.[02]": 0.3}, {"1": 0.0, ".*": 0.25}]),
    consistency=st.sampled_from(CONSISTENCY),
    chosen=st.sampled_from(["auto", "all", "latter-half", (0,)]),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    documents=st.lists(st.tuples(st.integers(0, 2**40 - 1), st.integers(0, 150)), max_size=4),
    layers=st.integers(1, 5),
    heads=st.integers(0, 3),
    decoder=st.booleans(),
    spare=st.none() | st.integers(0, 40),
)
def test_a_plan_is_its_masks(
    attention,
    hidden,
    rate_pattern,
    consistency,
    chosen,
    seed,
    step,
    documents,
    layers,
    heads,
    decoder,
    spare,
) -> None:
    config = hk.HiddenKeyConfig(
        attention, hidden, rate_pattern=rate_pattern, consistency=consistency, layers=chosen, seed=seed
    )
    ids, lengths = [sample for sample, _ in documents], [length for _, length in documents]
    columns = None if spare is None else max(lengths, default=0) + spare
    plan = plan_step(config, step, ids, lengths, layers=layers, heads=heads, decoder=decoder, columns=columns)
    width = max(lengths, default=0) if columns is None else columns
    role = "decoder" if decoder else "encoder"
    dropping = resolve_layers(chosen, None if decoder else layers, layers if decoder else None)[role]
    copies = branches(config)
    assert plan.samples.tolist() == ids * copies
    assert plan.lengths.tolist() == lengths * copies
    assert plan.branches.tolist() == [branch for branch in range(copies) for _ in ids]
    planned = 0
    for layer in range(layers):
        for site, part, count in (("attention", attention, heads), ("ffn", hidden, 1)):
            rate = 0.0 if part is None else rate_for(config, part.rate, [f"layers.{layer}"])
            if layer not in dropping or part is None or part.pattern == "element" or rate == 0:
                assert (layer, site) not in plan
                continue
            planned += 1
            mask, kept = plan.mask(layer, site), plan.kept(layer, site)
            assert mask.shape == (len(ids) * copies, count, 1, width)
            for branch in range(copies):
                key = MaskKey(seed, step, branch, layer, site)
                if part.pattern == "column":
                    expected = masks.column(key, ids, width, rate, count, lengths=lengths)
                else:
                    expected = masks.span(key, ids, lengths, rate, count, columns=width)
                rows = slice(branch * len(ids), (branch + 1) * len(ids))
                assert np.array_equal(mask.words[rows], expected.words), (layer, site, branch)
                assert np.array_equal(kept[rows], expected.to_bool().sum(axis=(2, 3)))
    assert planned == len(plan.entries)


def test_a_plan_is_the_reference() -> None:
    """Without the library's own masks between: the definition, for both branches."""
    config = hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.2), hk.HiddenDrop("span", 0.3), seed=2**63 + 5)
    plan = plan_step(config, 2**31, [5, 2**39], [130, 7], layers=3, heads=2)
    for layer in range(3):
        for branch in (0, 1):
            where = (2**63 + 5, 2**31, branch, layer)
            columns = reference.column(*where, "attention", [5, 2**39], 130, 0.2, heads=2)
            columns[1, :, :, 7:] = False
            spans = reference.span(*where, "ffn", [5, 2**39], [130, 7], 0.3)
            rows = slice(2 * branch, 2 * branch + 2)
            assert np.array_equal(plan.mask(layer, "attention").to_bool()[rows], columns)
            assert np.array_equal(plan.mask(layer, "ffn").to_bool()[rows], spans)


@pytest.mark.parametrize(
    ("preset", "copies"), [("hiddenkey", 2), ("hiddenkey-js", 1), ("hiddenkey-minus", 1), ("dropkey-span", 1)]
)
def test_branches(preset: str, copies: int) -> None:
    plan = plan_step(preset, 0, [7, 9], [5, 4], layers=2, heads=4)
    assert plan.mask(0, "attention").shape == (2 * copies, 4, 1, 5)
    assert plan.branches.tolist() == [0, 0, 1, 1][: 2 * copies]
    if copies == 2:
        long = plan_step(preset, 0, [7], [900], layers=1, heads=1).mask(0, "attention").words
        assert not np.array_equal(long[0], long[1]), "the branches of a step differ"


def test_rates_by_layer() -> None:
    config = hk.HiddenKeyConfig.preset("dropkey-column", rate_pattern={"layers.1": 0.0, r"layers\.[23]": 0.5})
    plan = plan_step(config, 0, range(50), [400] * 50, layers=4, heads=1)
    assert (1, "attention") not in plan
    shares = [1 - plan.kept(layer, "attention").mean() / 400 for layer in (0, 2, 3)]
    assert shares == pytest.approx([0.1, 0.5, 0.5], abs=0.02)


def test_a_decoder_drops_in_its_latter_half() -> None:
    def planned(**stack) -> list[int]:
        return sorted(entry.layer for entry in plan_step("dropkey-column", 0, [1], [9], heads=1, **stack).entries)

    assert planned(layers=5, decoder=True) == [3, 4]
    assert planned(layers=5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("pattern", ["column", "span"])
def test_memory_is_at_most_twice_the_bits(pattern: str) -> None:
    plan = plan_step(f"dropkey-{pattern}", 0, range(32), [512] * 32, layers=24, heads=16)
    bits = 24 * 32 * 16 * 512
    assert plan.nbytes == bits // 8 + 24 * 32 * 16 * 4
    assert plan.nbytes <= 2 * bits // 8
    assert np.shares_memory(plan.mask(3, "attention").words, plan.mask(3, "attention").words), "a view, no copy"
    assert np.shares_memory(plan.kept(3, "attention"), plan.kept(3, "attention"))


def test_what_is_not_planned() -> None:
    for preset in ("none", "r-drop", "dropkey-element", "dropattention-element", "hiddencut-element"):
        plan = plan_step(preset, 0, [7, 9], [5, 4], layers=2, heads=4)
        assert (plan.entries, plan.nbytes) == ((), 0), preset
        with pytest.raises(ConfigError, match=r"got 'attention' of layer 0\); this plan holds nothing"):
            plan.mask(0, "attention")
    guided = hk.HiddenKeyConfig(None, hk.HiddenDrop("span", start="attention"))
    assert plan_step(guided, 0, [7], [5], layers=2, heads=4).entries == ()


def test_an_empty_batch() -> None:
    plan = plan_step("hiddenkey", 0, [], [], layers=2, heads=4)
    assert plan.mask(1, "attention").shape == (0, 4, 1, 0)
    assert plan.kept(1, "attention").shape == (0, 4)
    assert plan_step("hiddenkey", 0, [3], [0], layers=1, heads=4).kept(0, "attention").tolist() == [[0] * 4] * 2
    nothing = plan_step("hiddenkey", 0, [3, 4], [0, 0], layers=2, heads=4).all_to_torch()
    assert {tuple(mask.shape) for mask in nothing.values()} == {(4, 4, 1, 0)}
    assert plan_step("hiddenkey", 0, [3], [4], layers=1, heads=0).mask(0, "attention").shape == (2, 0, 1, 4)
    assert plan_step("hiddenkey", 0, [3], [4], layers=0, heads=3).entries == ()


def test_repr_says_what_it_is() -> None:
    plan = plan_step("hiddenkey", 0, [7, 9], [5, 4], layers=2, heads=4)
    assert repr(plan) == "StepPlan(2 sites, 4 documents, 5 columns)"


def test_numbers_may_be_numpys() -> None:
    plan = plan_step("dropkey-column", np.uint32(3), np.array([1], np.uint8), (200,), layers=1, heads=1)
    narrow = plan_step(
        "dropkey-column", 3, [1], np.array([200], np.uint8), layers=np.int8(1), heads=np.int8(1), columns=np.uint8(250)
    )
    assert narrow.mask(0, "attention").shape == (1, 1, 1, 250)
    assert np.array_equal(narrow.mask(0, "attention").to_bool()[..., :200], plan.mask(0, "attention").to_bool())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": "hiddenky"}, ConfigError, "did you mean 'hiddenkey'"),
        ({"step": 2**32}, ConfigError, r"step must be .*got 4294967296"),
        ({"step": -1}, ConfigError, r"step must be .*got -1"),
        ({"sample_ids": [1]}, DataError, "2 lengths for 1 samples"),
        ({"sample_ids": [1, -1]}, DataError, r"sample ids must lie in .*got -1"),
        ({"sample_ids": [1, 2**40]}, DataError, rf"sample ids must lie in .*got {2**40}"),
        ({"sample_ids": [1.0, 2.0]}, DataError, "sample ids must be .*float64"),
        ({"sample_ids": [[1], [2, 3]]}, DataError, "sample ids must be .*no array"),
        ({"lengths": [1, -1]}, DataError, r"lengths must lie in .*got -1"),
        ({"lengths": [1, 2**20 + 1]}, DataError, r"lengths must lie in .*got 1048577"),
        ({"columns": 3}, DataError, r"length must lie in 0\.\.=3 \(got 4\)"),
        ({"columns": -1}, ConfigError, r"columns must be .*got -1"),
        ({"columns": 4.0}, ConfigError, r"columns must be .*got 4.0"),
        ({"columns": 2**20 + 1}, ConfigError, r"columns must be .*got 1048577"),
        ({"layers": 1025}, ConfigError, r"layers must be .*got 1025"),
        ({"layers": None}, ConfigError, r"layers must be .*got None"),
        ({"heads": 1025}, ConfigError, r"heads must be .*got 1025"),
        ({"heads": 1.5}, ConfigError, r"heads must be .*got 1.5"),
        ({"config": hk.HiddenKeyConfig(layers=[2])}, ConfigError, r"lies beyond the model \(got 2, the encoder has 2"),
        (
            {"sample_ids": np.arange(2**13), "lengths": np.full(2**13, 2**20), "layers": 1024, "heads": 1024},
            ConfigError,
            "does not fit into memory",
        ),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"config": "hiddenkey", "step": 0, "sample_ids": [1, 2], "lengths": [4, 3], "layers": 2, "heads": 1}
    with pytest.raises(error, match=message):
        plan_step(**{**arguments, **change})


@pytest.mark.parametrize("place", [(2, "attention"), (0, "ffn"), (0, "atention"), (None, None)])
def test_a_place_that_was_not_planned(place) -> None:
    plan = plan_step("dropkey-column", 0, [1], [4], layers=2, heads=1)
    for look in (plan.mask, plan.kept):
        with pytest.raises(ConfigError, match=r"this plan holds attention of layer 0, attention of layer 1"):
            look(*place)
    assert place not in plan
    assert (0, "attention") in plan
