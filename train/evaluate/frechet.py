"""The Frechet distance between two sets of features, and how it depends on their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Extrapolation measures subsets of these parts of the sets, evenly spaced in 1 / n.
PARTS = tuple(1 / x for x in np.linspace(1, 4, 7).tolist())


@dataclass(frozen=True)
class Moments:
    """Mean `[D]` and covariance `[D, D]`, in float64, of `count` features."""

    mean: Array
    covariance: Array
    count: int

    @classmethod
    def of(cls, features: Array, ddof: int = 0) -> Moments:
        """Of `features [N, D]`; the covariance is a sum over N divided by N - `ddof`.

        Raises ValueError for fewer than 2 features and for values that are no finite numbers.
        """
        if len(features) < 2:
            raise ValueError(f"a Frechet distance needs 2 videos or more on each side, not {len(features)}: add videos")
        features = np.asarray(features, np.float64)
        if not np.isfinite(features).all():
            raise ValueError("features are not finite numbers: check the network's weights")
        mean = features.mean(0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - ddof), len(features))


def distance(mean1: Array, covariance1: Array, mean2: Array, covariance2: Array) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2 of two Gaussians (Dowson and Landau, 1982), never < 0.

    Means `[D]` and symmetric covariances `[D, D]`, which may be singular.
    """
    # With S = A A^T, the last trace is the sum of the singular values of A1^T A2: no root of a rounded zero is taken.
    product = _factor(covariance1).T @ _factor(covariance2)
    shared = np.linalg.svd(product, compute_uv=False).sum()
    apart = np.square(np.asarray(mean1, np.float64) - mean2).sum()
    return max(0.0, float(apart + np.trace(covariance1) + np.trace(covariance2) - 2 * shared))


def _factor(covariance: Array) -> Array:
    """A `[D, R]` with A A^T = `covariance`, by its eigenvectors whose eigenvalue is more than rounding."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    positive = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, positive] * np.sqrt(values[positive])


def between(first: Array, second: Array, ddof: int = 0) -> float:
    """The distance between features `[N, D]` and `[M, D]`; ValueError as `Moments.of`."""
    a, b = Moments.of(first, ddof), Moments.of(second, ddof)
    return distance(a.mean, a.covariance, b.mean, b.covariance)


# How it depends on n


@dataclass(frozen=True)
class Line:
    """value + slope / n: `value` is what is expected of endless sets."""

    value: float
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def fit(sizes: Sequence[int], distances: Sequence[float]) -> Line:
    """The straight line in 1 / n through distances of sets of n features, by least squares."""
    assert len(sizes) == len(distances) > 1
    terms = np.stack([np.ones(len(sizes)), 1 / np.asarray(sizes, np.float64)], 1)
    (value, slope), *_ = np.linalg.lstsq(terms, np.asarray(distances, np.float64), rcond=None)
    return Line(float(value), float(slope), tuple(sizes), tuple(distances))


def extrapolate(first: Array, second: Array, *, seed: int = 0, ddof: int = 0) -> Line:
    """The distance of endless sets, from those of random subsets of `first [N, D]` and `second [M, D]`.

    Both are cut to the same part, from a quarter to all, so that the sizes of one stand for both; of small parts as
    many as are disjoint are averaged. The line holds where n is not far below D; that it takes away the bias of n says
    nothing of chance, which stays as large as the distance's own.
    Raises ValueError for fewer than 16 features.
    """
    least = min(len(first), len(second))
    if least < 16:
        raise ValueError(f"an extrapolation needs 16 videos or more on each side, not {least}: add videos")
    random = np.random.default_rng(seed)
    sizes, distances = [], []
    for part in PARTS:
        n, m = (round(part * len(features)) for features in (first, second))
        a, b = random.permutation(len(first)), random.permutation(len(second))
        draws = min(len(a) // n, len(b) // m)
        found = [between(first[a[i * n :][:n]], second[b[i * m :][:m]], ddof) for i in range(draws)]
        sizes.append(n)
        distances.append(float(np.mean(found)))
    return fit(sizes, distances)
