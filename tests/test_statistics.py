"""Statistics against SciPy, published tables, hand-computed values, and by simulation under the null."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import hiddenkey_rs as hk
from hiddenkey_rs.experiments.statistics import (
    bootstrap,
    detectable,
    effect_size,
    hedges_correction,
    holm,
    mean_interval,
    paired_power,
    seeds_needed,
    sign_flip,
)

hundredths = st.integers(-50, 50).map(lambda n: n / 100)


@settings(max_examples=30, deadline=None)
@given(st.lists(hundredths, min_size=2, max_size=9).filter(any))
def test_sign_flips_are_scipys(differences: list[float]) -> None:
    # Hundredths tie often, and SciPy counts a tie by the same rule: as far out as what was observed.
    theirs = stats.permutation_test(
        (np.array(differences),),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        n_resamples=2 ** len(differences),
        vectorized=True,
    )
    assert sign_flip(differences) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_sign_flips_by_hand() -> None:
    # Of the 16 sums of -+1 -+2 -+3 -+1 those with |sum| >= 5: 7, 5 and 5 (one of the ones turned), and their mirrors.
    flips = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    by_hand = np.mean(np.abs(flips @ np.array([1, 2, 3, -1])) >= 5)
    assert sign_flip([1, 2, 3, -1]) == by_hand == 0.375
    assert sign_flip([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip([3.0]) == 1.0


def test_ties_of_rounded_figures_are_ties() -> None:
    """Shares of 408 rows, written to six digits: flips of equal counts tie, and others do not."""
    counts = np.array([8, 4, 1, -4, -3, -9, -8, -9, -6, 8, 4, 10])
    bases = np.array([300, 304, 318, 309, 305, 301, 302, 317, 291, 312, 306, 280])
    rounded = np.array([round((b + n) / 408, 6) - round(b / 408, 6) for b, n in zip(bases, counts, strict=True)])
    exact = sign_flip(counts.astype(float))
    assert sign_flip(rounded, rounded=1e-6) == exact != sign_flip(rounded)


def test_the_smallest_p_halves_with_every_seed() -> None:
    assert sign_flip(np.ones(8)) == 2 / 2**8
    assert sign_flip(-np.ones(12)) == 2 / 2**12
    assert sign_flip(np.ones(20)) == 2 / 2**20
    # eight seeds cannot be significant in a family of eight, twelve can
    assert 8 * sign_flip(np.ones(8)) > 0.05 > 8 * sign_flip(np.ones(12))


def test_many_differences_are_flipped_at_random() -> None:
    differences = np.random.default_rng(4).normal(0.3, 1, 20)
    exact = sign_flip(differences)
    # one more difference, of zero, changes no sum; it is beyond what is counted exactly
    drawn = sign_flip(np.append(differences, 0.0), draws=200_000, seed=1)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 200_000))
    assert drawn == sign_flip(np.append(differences, 0.0), draws=200_000, seed=1)
    assert sign_flip(np.ones(40), draws=999) == 1 / 1000  # the observed flip counts, so that p is never 0


def test_holm_by_hand() -> None:
    # .005 x 4, .01 x 3, .03 x 2, .04 x 1 lifted to .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02, 0.02]) == [0.04, 0.04]
    assert holm([]) == []
    # what has not been run keeps its place: the family does not shrink
    assert holm([0.01, None, None, 0.02]) == [0.04, None, None, 0.06]
    assert holm([0.0, None]) == [0.0, None]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """By definition: a hypothesis' corrected p is the largest Bonferroni p of the sets that contain it."""
    corrected = holm(p_values)
    m = len(p_values)
    sets = [[n for n in range(m) if bits >> n & 1] for bits in range(1, 2**m)]
    bonferroni = [min(1.0, len(chosen) * min(p_values[n] for n in chosen)) for chosen in sets]
    for place in range(m):
        by_definition = max(p for p, chosen in zip(bonferroni, sets, strict=True) if place in chosen)
        assert corrected[place] == pytest.approx(by_definition)


def test_the_mean_interval_is_students() -> None:
    values = [0.81, 0.79, 0.83, 0.80, 0.84]
    found, theirs = mean_interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.estimate == pytest.approx(np.mean(values))
    alone = mean_interval([0.5])
    assert alone.estimate == 0.5
    assert math.isnan(alone.low)


def test_hedges_correction_by_hand() -> None:
    # gamma(1/2) = sqrt(pi) makes these closed forms; further up his own approximation is good to a thousandth
    closed = {2: 1 / math.sqrt(math.pi), 3: math.sqrt(math.pi / 6), 4: math.sqrt(2 / math.pi)}
    for freedom, value in closed.items():
        assert hedges_correction(freedom) == pytest.approx(value)
    for freedom in (10, 20, 500):
        assert hedges_correction(freedom) == pytest.approx(1 - 3 / (4 * freedom - 1), abs=1e-3)


def test_effect_sizes_invert_the_noncentral_t() -> None:
    values = np.random.default_rng(0).normal(0.5, 1, 12)
    found, n = effect_size(values), len(values)
    t = float(stats.ttest_1samp(values, 0).statistic)
    scale = hedges_correction(n - 1) / math.sqrt(n)
    assert found.estimate == pytest.approx(t * scale)
    assert stats.nct.sf(t, n - 1, found.low / scale) == pytest.approx(0.025, abs=1e-5)
    assert stats.nct.cdf(t, n - 1, found.high / scale) == pytest.approx(0.025, abs=1e-5)
    mirrored = effect_size(-values)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), rel=1e-4)
    # the interval excludes 0 exactly where the t test rejects
    assert (found.low > 0) == (stats.ttest_1samp(values, 0).pvalue < 0.05)
    assert math.isnan(effect_size([0.1, 0.1, 0.1]).estimate)
    assert math.isnan(effect_size([0.1, 0.2]).estimate)


@pytest.mark.parametrize("shift", [0.0, 0.1, 3.0, 1e4])
def test_effect_sizes_stay_finite(shift: float) -> None:
    for n in (3, 12, 40):
        found = effect_size(shift + np.random.default_rng(n).normal(0, 1, n))
        assert found.low < found.estimate < found.high
        assert np.isfinite([found.low, found.high]).all()


def test_power_is_the_textbooks() -> None:
    # Cohen's small, medium and large d_z at power .8 and two-sided alpha .05, as G*Power and every table has them
    assert [seeds_needed(effect) for effect in (0.2, 0.5, 0.8)] == [199, 34, 15]
    assert seeds_needed(-0.5) == 34
    assert paired_power(0.5, 34) >= 0.8 > paired_power(0.5, 33)
    assert seeds_needed(0.5, alpha=0.05 / 8) > 34
    assert seeds_needed(0.5, power=0.95) == 54
    assert seeds_needed(0.0) is seeds_needed(math.nan) is seeds_needed(1e-9) is None
    assert seeds_needed(1e6) == seeds_needed(5.0) == 6  # 2**(1 - 6) is the first smallest p of sign flips below .05
    assert seeds_needed(1e6, alpha=0.05 / 6) == 8
    assert paired_power(0.0, 12) == pytest.approx(0.05)


def test_what_is_detectable_would_be_detected() -> None:
    values = np.random.default_rng(3).normal(0, 0.02, 12)
    size = detectable(values) / values.std(ddof=1)
    assert paired_power(size, 12) == pytest.approx(0.8, abs=1e-6)
    assert seeds_needed(size) == 12 or seeds_needed(size * (1 + 1e-9)) == 12
    assert math.isnan(detectable([0.1]))
    assert math.isnan(detectable([0.1, 0.1 + 1e-15]))
    assert detectable(values[:5]) == detectable(values[:2], alpha=0.0005) == math.inf > detectable(values[:6])


def test_power_by_simulation() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(0.8, 1, (4000, 15))
    rejected = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert rejected.mean() == pytest.approx(paired_power(0.8, 15), abs=0.02)


def test_the_bootstrap_of_seeds_alone_is_scipys_widened() -> None:
    values = np.random.default_rng(2).normal(0.3, 1, 12)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found, wider = bootstrap(values, draws=20_000), math.sqrt(12 / 11) * stats.t.ppf(0.975, 11) / 1.96
    mean = values.mean()
    assert found.estimate == pytest.approx(mean)
    assert found.low - mean == pytest.approx((theirs.low - mean) * wider, abs=0.02)
    assert found.high - mean == pytest.approx((theirs.high - mean) * wider, abs=0.02)


def test_the_bootstrap_draws_seeds_and_examples() -> None:
    """Its spread is that of the mean: seeds / S, rows / N, and what is neither / SN, each counted once."""
    rng = np.random.default_rng(0)
    seeds, rows = 12, 150

    def error(table: np.ndarray, freedom: float) -> float:
        found = bootstrap(table, draws=8000)
        return (found.high - found.low) / 2 / stats.t.ppf(0.975, freedom)

    by_seed = rng.normal(0, 1, (seeds, 1))
    expected = by_seed.std(ddof=1) / math.sqrt(seeds)
    assert error(np.repeat(by_seed, rows, axis=1), seeds - 1) == pytest.approx(expected, rel=0.05)
    by_row = rng.normal(0, 1, (1, rows))
    expected = by_row.std(ddof=1) / math.sqrt(rows)
    assert error(np.repeat(by_row, seeds, axis=0), rows - 1) == pytest.approx(expected, rel=0.05)
    found = [error(rng.normal(0, 1, (seeds, rows)), seeds) for _ in range(20)]
    assert np.mean(found) == pytest.approx(1 / math.sqrt(seeds * rows), rel=0.2)


def test_the_bootstrap_repeats_and_has_the_p_of_its_spread() -> None:
    table = np.random.default_rng(0).normal(0.1, 1, (12, 30))
    assert bootstrap(table, seed=3) == bootstrap(table, seed=3)
    assert bootstrap(table, seed=3) != bootstrap(table, seed=4)
    assert bootstrap(np.full((12, 5), 0.5)).p == 0.0
    assert bootstrap(np.zeros((3, 5))).p == 1.0
    plus, minus = bootstrap(table + 0.05), bootstrap(-table - 0.05)
    assert plus.p == minus.p
    assert plus.low == pytest.approx(-minus.high)
    one = bootstrap(np.arange(6.0)[None])  # a single seed: examples alone
    assert one.low < 2.5 < one.high
    lone = table[:, 0]
    assert bootstrap(lone).p == pytest.approx(stats.ttest_1samp(lone, 0).pvalue)


def test_three_seeds_of_one_sign_are_no_proof() -> None:
    """Of 27 resamples none may lie beyond 0; but Student's interval of the same three numbers holds it."""
    differences = [-0.048, -0.012, -0.029]
    assert mean_interval(differences).high > 0
    found = bootstrap(differences).p
    assert found > 0.05
    assert found == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [[1.0]], [math.inf]])
def test_what_is_no_number_is_refused(bad: list[float]) -> None:
    for function in (sign_flip, mean_interval, effect_size):
        with pytest.raises(hk.DataError, match="a test needs numbers, one a seed"):
            function(bad)
    if bad != [[1.0]]:
        with pytest.raises(hk.DataError, match="a bootstrap needs finite"):
            bootstrap(bad)


def test_the_corrected_procedure_is_wrong_one_time_in_twenty() -> None:
    """Eight true nulls, twelve seeds, differences of the family correlated as tests against shared runs are."""
    rng, trials, wrong, raw = np.random.default_rng(0), 1500, 0, 0
    for _ in range(trials):
        shared = rng.normal(size=(12, 4, 1))  # one method's runs on four tasks, compared with two baselines
        differences = 0.7 * shared + 0.7 * rng.normal(size=(12, 4, 2))
        p_values = [sign_flip(differences[:, task, baseline]) for task in range(4) for baseline in range(2)]
        raw += sum(p < 0.05 for p in p_values)
        wrong += min(p for p in holm(p_values) if p is not None) < 0.05
    assert raw / (8 * trials) == pytest.approx(0.05, abs=0.006)  # one test alone
    assert 0.025 < wrong / trials < 0.06  # any of the family


@pytest.mark.parametrize(
    ("seed_sd", "row_sd", "rest_sd"), [(0.02, 0.0, 0.1), (0.0, 0.3, 0.3), (0.0, 0.0, 0.4), (0.005, 0.02, 0.4)]
)
def test_the_bootstrap_covers_what_it_says(seed_sd: float, row_sd: float, rest_sd: float) -> None:
    rng, trials, covered = np.random.default_rng(7), 300, 0
    for number in range(trials):
        parts = (
            seed_sd * rng.normal(size=(12, 1)),
            row_sd * rng.normal(size=(1, 300)),
            rest_sd * rng.normal(size=(12, 300)),
        )
        found = bootstrap(sum(parts), draws=1000, seed=number)
        covered += found.low <= 0 <= found.high
    assert 0.915 < covered / trials < 0.99
