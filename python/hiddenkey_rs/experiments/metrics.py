"""Scores of predictions, by the libraries of their fields: scikit-learn and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .extras import extra
from .tasks import Task

Array = NDArray[np.float64]


def scores(task: Task, predictions: Array, labels: Array) -> dict[str, float]:
    """The task's metrics. ``predictions``: class numbers or values, (N,), as ``labels``."""
    # By what the task has, not by what a split happens to hold: three classes are no two where the third is rare.
    how = {"average": "binary"} if task.num_labels == 2 else {"average": "macro", "labels": range(task.num_labels)}
    known = {**_METRICS, "f1": _sklearn("f1_score", zero_division=0, **how)}
    return {name: float(known[name](predictions, labels)) for name in task.metrics if name in known}


def _correlation(function: str) -> Callable[[Array, Array], float]:
    def correlate(predictions: Array, labels: Array) -> float:
        # A constant has no correlation with anything; 0 says that, where NaN would spoil every comparison.
        if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        return float(getattr(extra("scipy.stats"), function)(predictions, labels).statistic)

    return correlate


def _sklearn(function: str, **arguments: object) -> Callable[[Array, Array], float]:
    return lambda predictions, labels: getattr(extra("sklearn.metrics"), function)(labels, predictions, **arguments)


_METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": _sklearn("accuracy_score"),
    "matthews": _sklearn("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def perplexity(loss: float) -> float:
    """Exp of a mean token loss in nats; infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def expected_calibration_error(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """How far confidence and accuracy lie apart, on average over the rows (Guo et al. 2017).

    Rows are binned by the predicted class' probability into ``bins`` intervals ``(lower, upper]`` of equal width; of each
    bin counts ``abs(accuracy - mean confidence)``, weighted by its rows.

    Args:
        probabilities: of the classes, ``(rows, classes)``, every row with the sum 1. labels: class numbers, ``(rows,)``.
        bins: how many, at least 1.

    Returns:
        A value in [0, 1]; 0 is perfect. NaN where a probability is none: the model diverged.

    Raises:
        DataError: shapes that do not fit, no rows, or rows that are no distributions.

    Example:
        >>> expected_calibration_error(np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1]))  # half right, 90 % sure
        0.4
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        shapes = f"{probabilities.shape} and {labels.shape}"
        raise DataError(f"calibration needs (rows, classes) and (rows,) (got {shapes}); give one label a row")
    if not np.isfinite(probabilities).all():
        return math.nan
    strange = ~(np.isclose(probabilities.sum(axis=1), 1, atol=1e-3) & (probabilities >= 0).all(axis=1))
    if strange.any():
        row = int(strange.argmax())
        raise DataError(
            f"a row is no distribution (got {probabilities[row]} in row {row}); give probabilities, not logits"
        )
    confidence = probabilities.max(axis=1)
    gain = (probabilities.argmax(axis=1) == labels) - confidence
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")
    return float(np.abs(np.bincount(place, weights=gain)).sum() / len(labels))
