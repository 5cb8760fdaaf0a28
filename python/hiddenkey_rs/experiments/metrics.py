"""Scores of predictions, by the libraries of their fields: scikit-learn and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .extras import extra

Array = NDArray[np.float64]


def scores(names: tuple[str, ...], predictions: Array, labels: Array) -> dict[str, float]:
    """The named metrics. ``predictions``: class numbers or values, (N,), as ``labels``."""
    return {name: float(_METRICS[name](predictions, labels)) for name in names if name in _METRICS}


def _correlation(function: str) -> Callable[[Array, Array], float]:
    def correlate(predictions: Array, labels: Array) -> float:
        # A constant has no correlation with anything; 0 says that, where NaN would spoil every comparison.
        if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        return float(getattr(extra("scipy.stats"), function)(predictions, labels).statistic)

    return correlate


def _sklearn(function: str, **arguments: object) -> Callable[[Array, Array], float]:
    return lambda predictions, labels: getattr(extra("sklearn.metrics"), function)(labels, predictions, **arguments)


def _f1(predictions: Array, labels: Array) -> float:
    average = "binary" if set(np.unique(labels)) <= {0, 1} else "macro"
    return float(extra("sklearn.metrics").f1_score(labels, predictions, average=average, zero_division=0))


_METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": _sklearn("accuracy_score"),
    "f1": _f1,
    "matthews": _sklearn("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def perplexity(loss: float) -> float:
    """Exp of a mean token loss in nats; infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
