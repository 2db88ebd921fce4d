"""The smooth field that a coil lays over an image: found from the image alone, and divided out.

Networks learn what intensities look like; a field that makes one side of the image three times as bright as the other
moves them further than adapted norm layers can follow. A field spreads the few intensities of the tissues over many
values, so the one that undoes it gathers them again: it makes the entropy of the intensity histogram smallest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ukbob_seg.preprocessing.normalization import ChannelNormalization

SAMPLES = 60_000  # voxels that the field is found from, evenly spread
DEGREE = 3
TERMS = [
    term for term in itertools.product(range(DEGREE + 1), repeat=3) if 0 < sum(term) <= DEGREE
]  # powers of z, y, x
ITERATIONS = 60
OFFSET, TOP, BINS = 0.2, 10.0, 192  # of the histogram: log(intensity + offset), up to a value, in units of the mean
SMOOTHING = np.array([1, 4, 6, 4, 1]) / 16
BOUND = 2.0  # of the coefficients: what a field may change by along an axis, in units of the logarithm
RIDGE = np.where([sum(term) < DEGREE for term in TERMS], 0.1, 0.3)  # of the squared coefficients, in nats


@dataclass(frozen=True)
class Field:
    """A smooth factor over an image, whose logarithm is a polynomial of third degree.

    Attributes:
        weights: of the Legendre products ``TERMS``; the image times exp of their sum is free of the field.
        entropy_before: of the histogram of logarithmic intensities, in nats.
        entropy_after: the same with the field divided out.
    """

    weights: tuple[float, ...]
    entropy_before: float
    entropy_after: float

    @property
    def gain(self) -> float:
        """What the entropy falls by, in nats."""
        return self.entropy_before - self.entropy_after

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm over the image's box (exact: Legendre polynomials are orthogonal)."""
        norms = [np.prod([1 / (2 * power + 1) for power in term]) for term in TERMS]
        return float(np.sqrt(np.square(self.weights) @ norms))

    def logarithm(self, shape: Sequence[int]) -> Tensor:
        """What to add to the logarithm of the image: (Z, Y, X) float32."""
        weights = torch.zeros(3 * (DEGREE + 1,))
        for term, weight in zip(TERMS, self.weights, strict=True):
            weights[term] = weight
        z, y, x = (torch.from_numpy(_legendre(n).astype(np.float32)) for n in shape)
        return torch.einsum("abc,az,by,cx->zyx", weights, z, y, x)


def remove_fields(
    image: Tensor, schemes: Sequence[ChannelNormalization], least_gain: float, least_spread: float
) -> tuple[Tensor, tuple[Field | None, ...], tuple[int, ...]]:
    """Divide the fields out of those channels that show a distinct one; each channel has its own.

    Args:
        image: (C, Z, Y, X), normalised; channels beyond ``schemes`` (a previous stage's labels) stay as they are.
        schemes: how the channels were normalised. Only ``zscore`` channels are looked at: the others have a scale of
            their own (CT), on which no coil lays a field.
        least_gain: the intensity entropy has to fall by this, in nats.
        least_spread: the logarithm of the field has to vary by this (standard deviation).

    Returns:
        The image (the same tensor where there is nothing to remove), the field of each channel (None for those that are
        not looked at), and the channels that were changed.
    """
    fields: list[Field | None] = [None] * len(schemes)
    changed = {}
    for number, scheme in enumerate(schemes):
        if scheme.scheme != "zscore":
            continue
        inside = image[number] != 0 if scheme.mask_nonzero else None
        field = find_field(image[number], inside)
        fields[number] = field
        if field.gain >= least_gain and field.spread >= least_spread:
            changed[number] = flatten(image[number], field, inside)
    if changed:
        image = image.clone()
        for number, channel in changed.items():
            image[number] = channel
    return image, tuple(fields), tuple(changed)


def find_field(channel: Tensor, inside: Tensor | None = None) -> Field:
    """The field in one channel, relative to its smallest value.

    Args:
        channel: (Z, Y, X), any finite intensities.
        inside: (Z, Y, X) bool, the voxels that count; None for all.

    Returns:
        The field; no field at all for a constant channel.

    Reference: Mangin, Entropy minimization for automatic correction of intensity nonuniformity, MMBIA 2000; the model
    of the field, the histogram of logarithms and its gradient are ours.
    """
    step = max(1, int(np.ceil((channel.numel() / SAMPLES) ** (1 / 3))))
    places = [torch.arange(n // 2 % step, n, step) for n in channel.shape]
    grid = torch.meshgrid(*(place.to(channel.device) for place in places), indexing="ij")
    low = channel.min() if inside is None or not inside.any() else channel[inside].min()
    values = (channel[grid] - low).double().cpu().numpy().ravel()
    counts = np.ones(len(values), bool) if inside is None else inside[grid].cpu().numpy().ravel()
    if not values[counts].any():
        return Field((0.0,) * len(TERMS), 0.0, 0.0)
    z, y, x = (_legendre(n)[:, place.numpy()] for n, place in zip(channel.shape, places, strict=True))
    terms = np.stack([np.einsum("z,y,x->zyx", z[a], y[b], x[c]).ravel() for a, b, c in TERMS])
    values, terms = values[counts], terms[:, counts]
    start = np.zeros(len(TERMS))
    found = minimize(
        _entropy, start, (values, terms), "L-BFGS-B", True, bounds=[(-BOUND, BOUND)] * len(TERMS),
        options={"maxiter": ITERATIONS},
    )  # fmt: skip
    before, after = (_entropy(weights, values, terms, 0 * RIDGE)[0] for weights in (start, found.x))
    return Field(tuple(float(weight) for weight in found.x), before, after)


def flatten(channel: Tensor, field: Field, inside: Tensor | None = None) -> Tensor:
    """A channel without the field, with the mean and standard deviation that it had: (Z, Y, X), on its device.

    Voxels that are not ``inside`` stay as they are, and do not count.
    """
    values = channel.flatten() if inside is None else channel[inside]
    factor = field.logarithm(channel.shape).exp_().to(channel)
    flat = (values - values.min()) * (factor.flatten() if inside is None else factor[inside])
    flat = (flat - flat.mean()) * (values.std(correction=0) / flat.std(correction=0).clamp_min(1e-8)) + values.mean()
    if inside is None:
        return flat.reshape(channel.shape)
    return channel.masked_scatter(inside, flat)


def _legendre(count: int) -> np.ndarray:
    """Legendre polynomials up to the degree over an axis: (degree + 1, count), constant over an axis of one."""
    places = np.linspace(-1, 1, count) if count > 1 else np.zeros(1)
    return np.polynomial.legendre.legvander(places, DEGREE).T if count > 1 else np.eye(DEGREE + 1)[:, :1]


def _entropy(
    weights: np.ndarray, values: np.ndarray, terms: np.ndarray, ridge: np.ndarray = RIDGE
) -> tuple[float, np.ndarray]:
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
    gradient = terms @ by_log - (terms @ y / len(y)) * by_log.sum()
    entropy = -float(shares @ logs)
    return entropy + float(ridge @ weights**2), gradient + 2 * ridge * weights
