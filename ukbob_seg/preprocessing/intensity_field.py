"""The smooth field that a coil lays over an image, found from the image alone.

A field spreads the few intensities of the tissues over many values, so the one that undoes it gathers them again: it
makes the entropy of the intensity histogram smallest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SAMPLES = 60_000  # voxels that the field is found from, evenly spread
LOWEST = 0.001  # share of the voxels that may lie below what counts as no signal
DEGREE = 5
TERMS = [
    term for term in itertools.product(range(DEGREE + 1), repeat=3) if 0 < sum(term) <= DEGREE
]  # powers of z, y, x
ITERATIONS = 60
OFFSET, TOP, BINS = 0.2, 10.0, 192  # of the histogram: log(intensity + offset), up to a value, in units of the mean
SMOOTHING = np.array([1, 4, 6, 4, 1]) / 16
BOUND = 2.0  # of the coefficients: what a field may change by along an axis, in units of the logarithm
RIDGE_OF_DEGREE = 0.05, 0.05, 0.1, 0.2, 0.3  # of the squared coefficients of degree 1, 2, ..., in nats
RIDGE = np.array([RIDGE_OF_DEGREE[sum(term) - 1] for term in TERMS])
NO_WEIGHTS = (0.0,) * len(TERMS)


@dataclass(frozen=True)
class Field:
    """A smooth factor over an image, whose logarithm is a polynomial of degree ``DEGREE``.

    Attributes:
        weights: of the Legendre products ``TERMS``; the image times exp of their sum is free of the field, or has the
            field that it was asked for.
        entropy_before: of the histogram of logarithmic intensities, in nats, with the field that is usual.
        entropy_after: the same with this one.
        low: intensity of the image that no field changes: where there is no signal.
    """

    weights: tuple[float, ...]
    entropy_before: float = 0.0
    entropy_after: float = 0.0
    low: float = 0.0

    @property
    def gain(self) -> float:
        """What the entropy falls by, in nats."""
        return self.entropy_before - self.entropy_after

    def logarithm(self, shape: Sequence[int], usual: UsualField | None = None) -> np.ndarray:
        """What to add to the logarithm of the image, so that it has the usual field or none: (Z, Y, X) float32."""
        weights = np.zeros(3 * (DEGREE + 1,), np.float32)
        for term, weight in zip(TERMS, self.differences(usual), strict=True):
            weights[term] = weight
        z, y, x = (_legendre(n).astype(np.float32) for n in shape)
        return np.einsum("abc,az,by,cx->zyx", weights, z, y, x, optimize=True)

    def spread(self, usual: UsualField | None = None) -> float:
        """Standard deviation over the image's box of what ``logarithm`` gives (Legendre polynomials are orthogonal)."""
        norms = [np.prod([1 / (2 * power + 1) for power in term]) for term in TERMS]
        return float(np.sqrt(np.square(self.differences(usual)) @ norms))

    def differences(self, usual: UsualField | None) -> np.ndarray:
        """Of the weights from the usual ones."""
        return np.subtract(self.weights, NO_WEIGHTS if usual is None else usual.weights)


@dataclass(frozen=True)
class UsualField:
    """What fields the training images have in one channel.

    Attributes:
        weights: their mean.
        spread: the largest distance of one of them from it, as ``Field.spread`` measures it.
    """

    weights: tuple[float, ...] = NO_WEIGHTS
    spread: float = 0.0

    @classmethod
    def of(cls, fields: Sequence[Field]) -> UsualField:
        """Of the fields of some images, at least one."""
        mean = cls(tuple(float(weight) for weight in np.mean([field.weights for field in fields], axis=0)))
        return cls(mean.weights, max(field.spread(mean) for field in fields))

    @classmethod
    def joined(cls, usual: Sequence[UsualField]) -> UsualField:
        """What several sets of images have, at least one; the spread is an upper bound."""
        mean = cls(tuple(float(weight) for weight in np.mean([each.weights for each in usual], axis=0)))
        return cls(mean.weights, max(each.spread + Field(each.weights).spread(mean) for each in usual))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "weights": list(self.weights)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> UsualField | None:
        """Inverse of ``to_json``; None for what was found with other polynomials."""
        weights = tuple(content["weights"])
        return cls(weights, content["spread"]) if len(weights) == len(TERMS) else None


def find_field(channel: np.ndarray, inside: np.ndarray | None = None, usual: UsualField | None = None) -> Field:
    """The field in one channel, relative to its lowest values.

    Args:
        channel: (Z, Y, X), any finite intensities.
        inside: (Z, Y, X) bool, the voxels that count; None for all.
        usual: what fields such images have: weights near theirs are preferred.

    Returns:
        The field; the usual one for a constant channel, which shows none.

    Reference: Mangin, Entropy minimization for automatic correction of intensity nonuniformity, MMBIA 2000; the model
    of the field, the histogram of logarithms and its gradient are ours.
    """
    from scipy.optimize import minimize  # slow to import, and most commands look for no field

    start = np.array(NO_WEIGHTS if usual is None else usual.weights)
    step = max(1, int(np.ceil((channel.size / SAMPLES) ** (1 / 3))))
    places = [np.arange(n // 2 % step, n, step) for n in channel.shape]
    grid = np.ix_(*places)
    counts = np.ones(channel[grid].size, bool) if inside is None else inside[grid].ravel()
    if not counts.any():
        return Field(tuple(start.tolist()))
    values = channel[grid].ravel()[counts].astype(np.float64)
    low = float(np.quantile(values, LOWEST))  # the smallest of all may be one voxel's fault
    values = np.maximum(values - low, 0)
    if not values.any():
        return Field(tuple(start.tolist()), low=low)
    z, y, x = (_legendre(n)[:, place] for n, place in zip(channel.shape, places, strict=True))
    terms = np.stack([np.einsum("z,y,x->zyx", z[a], y[b], x[c]).ravel()[counts] for a, b, c in TERMS])
    found = minimize(
        _penalised, start, (start, values, terms), "L-BFGS-B", True, bounds=[(-BOUND, BOUND)] * len(TERMS),
        options={"maxiter": ITERATIONS},
    )  # fmt: skip
    before, after = (_entropy(weights, values, terms)[0] for weights in (start, found.x))
    return Field(tuple(found.x.tolist()), before, after, low)


def _legendre(count: int) -> np.ndarray:
    """Legendre polynomials up to the degree over an axis: (degree + 1, count), constant over an axis of one."""
    places = np.linspace(-1, 1, count) if count > 1 else np.zeros(1)
    return np.polynomial.legendre.legvander(places, DEGREE).T if count > 1 else np.eye(DEGREE + 1)[:, :1]


def _penalised(
    weights: np.ndarray, usual: np.ndarray, values: np.ndarray, terms: np.ndarray
) -> tuple[float, np.ndarray]:
    """The entropy, and what weights cost that are far from the usual ones; its gradient."""
    entropy, gradient = _entropy(weights, values, terms)
    distance = weights - usual
    return entropy + float(RIDGE @ distance**2), gradient + 2 * RIDGE * distance


def _entropy(weights: np.ndarray, values: np.ndarray, terms: np.ndarray) -> tuple[float, np.ndarray]:
    """Entropy of the histogram of log(y + offset), y the values times the factor in units of their mean; its gradient.

    Every value falls into two neighbouring bins, as far as it is near (Parzen), and the bins are smoothed, so that the
    entropy has a derivative.
    """
    y = values * np.exp(weights @ terms)
    y /= y.mean()
    scale = (BINS - 1) / (np.log(TOP + OFFSET) - np.log(OFFSET))
    place = (np.log(y + OFFSET) - np.log(OFFSET)) * scale
    inside = place < BINS - 1
    lower = np.minimum(place, BINS - 2).astype(np.int64)
    part = np.minimum(place, BINS - 1) - lower
    counts = np.bincount(lower, 1 - part, BINS) + np.bincount(lower + 1, part, BINS)
    shares = np.convolve(counts / len(y), SMOOTHING, "same")
    logs = np.log(shares + 1e-12)
    by_bin = -np.convolve(logs + shares / (shares + 1e-12), SMOOTHING, "same")
    by_place = (by_bin[lower + 1] - by_bin[lower]) * inside / len(y)
    by_log = by_place * scale * y / (y + OFFSET)  # the mean of y stays 1
    return -float(shares @ logs), terms @ by_log - (terms @ y / len(y)) * by_log.sum()
