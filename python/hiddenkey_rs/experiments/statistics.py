"""Tests, intervals and effect sizes of methods that were run on the same seeds, and how many seeds it takes.

Everything is paired: a seed gives both methods the same rows, the same order and the same initial weights, so what counts is
a seed's difference. Where SciPy has the distribution it is SciPy's; what is here is what SciPy lacks (Holm, two ways of
resampling at once) or does slowly (all sign flips).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError
from .extras import extra

Array = NDArray[np.float64]
EXACT_SEEDS = 20
"""Up to so many differences :func:`sign_flip` counts all flips."""
DRAWS = 10_000
_CHUNK = 500
_MOST_SEEDS = 100_000


def sign_flip(differences: ArrayLike, draws: int = 100_000, seed: int = 0, rounded: float = 0.0) -> float:
    """Two-sided p of paired differences (n,): the share of sign flips whose mean lies as far from 0 as the observed one.

    Exact up to 20 differences (all 2**n flips), else ``draws`` flips, the observed one counted among them. It asks only that
    a difference would be as likely with the other sign if the methods were alike. The smallest p is 2**(1 - n).

    ``rounded``: by how much rounding may have moved each difference. Flips that would tie without it do tie.

    Raises:
        DataError: no differences, or some that are no numbers.

    Example:
        >>> sign_flip([1.0, 2.0, 3.0, 4.0])  # only ++++ and ---- of 16 are as far out
        0.125
    """
    values = _numbers(differences)
    n, total = len(values), abs(values.sum())
    if n <= EXACT_SEEDS:
        sums = np.zeros(1)
        for value in values[1:]:  # the first sign is fixed: the other half mirrors this one
            sums = np.concatenate([sums - value, sums + value])
        sums += values[0]
    else:
        signs = np.random.default_rng(seed).integers(0, 2, (draws, n), dtype=np.int8) * 2 - 1
        sums = np.append(signs @ values, total)
    # Flips that tie exactly (differences of accuracies do) must not be told apart by rounding, of either sum.
    slack = max(1e-9 * np.abs(values).sum(), 2 * n * rounded)
    return float(np.mean(np.abs(sums) >= total - slack))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over a family, in the order given. ``None`` (not run yet) keeps its place in the family.

    The family's size is what was fixed beforehand: a test without a result counts as one with p = 1.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
        >>> holm([0.01, None, 0.03])
        [0.03, None, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda n: 1.0 if (p := p_values[n]) is None else p)
    corrected: list[float | None] = [None] * len(p_values)
    floor = 0.0
    for rank, place in enumerate(order):
        value = p_values[place]
        if value is not None:
            floor = max(floor, min(1.0, (len(order) - rank) * value))
            corrected[place] = floor
    return corrected


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float


def mean_interval(values: ArrayLike) -> Interval:
    """Mean of (n,) and Student's 95 % interval; of a single value an interval without bounds (NaN).

    Example:
        >>> found = mean_interval([1.0, 2.0, 3.0])  # 2 -+ 4.303 / sqrt(3)
        >>> round(found.low, 3), found.estimate, round(found.high, 3)
        (-0.484, 2.0, 4.484)
    """
    numbers = _numbers(values)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(extra("scipy.stats").t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    return Interval(mean, mean - half, mean + half)


def effect_size(differences: ArrayLike) -> Interval:
    """Hedges' g of paired differences: mean / sd (Cohen's d_z) without its small-sample bias, and its 95 % interval.

    The interval is exact where differences are normal: the noncentral t distributions that put the observed t at their 2.5 %
    ends. Fewer than three differences, or differences without spread, have no such size: NaN.

    Example:
        >>> round(effect_size([1.0, 2.0, 3.0]).estimate, 3)  # d_z = 2, times the correction of two degrees of freedom, .5642
        1.128
    """
    values = _numbers(differences)
    n = len(values)
    if n < 3 or constant(values):
        return Interval(math.nan, math.nan, math.nan)
    size = float(values.mean() / values.std(ddof=1))
    scale = hedges_correction(n - 1)
    inverse = extra("scipy.special").nctdtrinc
    low, high = (float(inverse(n - 1, q, size * math.sqrt(n))) / math.sqrt(n) for q in (0.975, 0.025))
    return Interval(scale * size, scale * low, scale * high)


def hedges_correction(freedom: int) -> float:
    """Hedges' factor c(m) for m > 1 degrees of freedom (Hedges 1981): gamma(m/2) / (sqrt(m/2) gamma((m-1)/2)).

    Example:
        >>> math.isclose(hedges_correction(4), math.sqrt(2 / math.pi))
        True
    """
    return math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)


def seeds_needed(effect: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """The smallest number of seeds at which a paired, two-sided t test finds an effect d_z with this power.

    Never fewer than :func:`sign_flip` needs for a p below ``alpha``. ``None`` where more than 100,000 would be needed, as
    for an effect of 0.

    Example:
        >>> seeds_needed(0.5)
        34
        >>> seeds_needed(5.0)  # four by the t test; but 2**(1 - 5) is .0625
        6
    """
    size = abs(effect)
    if not math.isfinite(size) or paired_power(size, _MOST_SEEDS, alpha) < power:
        return None
    low, high = 1, 2  # power(low) is too small, power(high) is enough
    while paired_power(size, high, alpha) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if paired_power(size, middle, alpha) >= power else (middle, high)
    return max(high, _fewest(alpha))


def _fewest(alpha: float) -> int:
    """Seeds at which the smallest p of all sign flips, 2**(1 - n), is below ``alpha``."""
    n = 1
    while 2.0 ** (1 - n) >= alpha:
        n += 1
    return n


def paired_power(effect: float, n: int, alpha: float = 0.05) -> float:
    """Power of a paired, two-sided t test of ``n`` differences at an effect d_z.

    Example:
        >>> round(paired_power(0.5, 34), 3)
        0.808
    """
    if effect == 0:
        return alpha
    stats = extra("scipy.stats")
    edge = stats.t.ppf(1 - alpha / 2, n - 1)
    # t**2 has a noncentral F distribution, whose tail SciPy finds where that of the noncentral t is NaN.
    return float(stats.ncf.sf(edge**2, 1, n - 1, n * effect**2))


def detectable(differences: ArrayLike, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true mean difference that these seeds, with their spread, would find with this power.

    Infinite where they are too few for any: for a p of sign flips below ``alpha``, or for this power at a thousand standard
    deviations. NaN of differences without spread.
    """
    values = _numbers(differences)
    if len(values) < 2 or constant(values):
        return math.nan
    if len(values) < _fewest(alpha) or paired_power(1e3, len(values), alpha) < power:
        return math.inf
    brentq = extra("scipy.optimize").brentq
    effect = brentq(lambda size: paired_power(size, len(values), alpha) - power, 1e-6, 1e3)
    return float(effect * values.std(ddof=1))


@dataclass(frozen=True)
class Resampled:
    """A mean difference, the 95 % interval of its resamples, and a two-sided p."""

    estimate: float
    low: float
    high: float
    p: float


def bootstrap(differences: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Resampled:
    """Resample seeds and, in every draw, examples: (seeds, examples) differences -> mean, interval and p.

    All seeds are reported on the same examples, so that both are drawn with replacement at once (Owen 2007): a row that is
    lucky for one method is lucky on all seeds, and to draw rows anew within every seed would count it as often. (seeds,)
    differences, of scores that are no means over examples, are resampled over seeds alone.

    The interval is the resamples' 2.5 and 97.5 % points, drawn out or in about the mean. Drawn twice, what belongs to neither
    seed nor row counts three times, and the centre counts as known; so resamples are scaled to the spread of the mean that the
    analysis of variance of a crossed design finds, and to Student's t on its degrees of freedom. p is Student's, too, of the
    mean over that spread, and 0 where there is none: the share of resamples beyond 0 would not do, as three seeds have 27
    resamples, of which easily none lies there. Of a single seed it is the normal distribution's.

    Example:
        >>> found = bootstrap(np.ones((3, 4)))
        >>> found.estimate, found.low, found.high
        (1.0, 1.0, 1.0)
    """
    table = np.asarray(differences, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise DataError(f"a bootstrap needs finite (seeds, examples) (got shape {table.shape}); leave failed runs out")
    rng = np.random.default_rng(seed)
    means = np.concatenate([_resample(table, min(_CHUNK, draws - done), rng) for done in range(0, draws, _CHUNK)])
    mean = float(table.mean())
    error, freedom = float(means.std()), math.inf
    if len(table) > 1 and error > 0:
        spread, (error, freedom) = error, _standard_error(table)
        means = mean + (means - mean) * (error / spread)
    t = extra("scipy.stats").t
    low, high = mean + (np.quantile(means, [0.025, 0.975]) - mean) * (t.ppf(0.975, freedom) / t.ppf(0.975, math.inf))
    size = abs(mean) / error if error > 0 else math.inf if mean else 0.0
    return Resampled(mean, float(low), float(high), float(2 * t.sf(size, freedom)))


def _standard_error(table: Array) -> tuple[float, float]:
    """Of the mean of crossed (seeds, examples), both random, never below that of either alone; and its degrees of freedom."""
    n, m = table.shape
    by_seed = table.mean(axis=1, keepdims=True)
    seeds = m * float(by_seed.var(ddof=1))
    if m == 1:
        return math.sqrt(seeds / n), n - 1.0
    by_row = table.mean(axis=0, keepdims=True)
    rows = n * float(by_row.var(ddof=1))
    rest = float(((table - by_seed - by_row + table.mean()) ** 2).sum()) / ((n - 1) * (m - 1))
    both = seeds + rows - rest
    if both >= max(seeds, rows):
        # Satterthwaite's degrees of freedom of a sum of mean squares.
        parts = seeds**2 / (n - 1) + rows**2 / (m - 1) + rest**2 / ((n - 1) * (m - 1))
        return math.sqrt(both / (n * m)), both**2 / parts if parts else n - 1.0
    return math.sqrt(max(seeds, rows) / (n * m)), n - 1.0 if seeds >= rows else m - 1.0


def _resample(table: Array, draws: int, rng: np.random.Generator) -> Array:
    seeds, examples = table.shape
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    rows = weights @ table
    if examples == 1:
        return rows[:, 0]
    return np.take_along_axis(rows, rng.integers(0, examples, (draws, examples)), axis=1).mean(axis=1)


def constant(values: Array) -> bool:
    """Whether values (n,) are all one, but for rounding."""
    return float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max(initial=0.0))


def _numbers(values: ArrayLike) -> Array:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise DataError(f"a test needs numbers, one a seed (got {found!r}); leave failed runs out")
    return found
