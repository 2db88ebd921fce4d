"""The numbers behind the report of preprocessing: classes, histograms, and cases unlike the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.preprocessing.fingerprint import IntensityStatistics
from ukbob_seg.preprocessing.fingerprint_cases import CaseFingerprint, CaseReading
from ukbob_seg.preprocessing.normalization import ChannelNormalization

BINS = 160
REACH = 0.12  # shown beyond the 0.5 and 99.5 percentiles, in their distance
TAILS = 4.0  # interquartile ranges shown beyond the quartiles, at most
CLIP_MARGIN = 0.05  # shown beyond the plan's clip, in its width
BATCH_SAMPLES = 1_000_000  # looked at together, so that nothing is copied whole
FAR = 3.0  # robust standard deviations from which a case is named
FEWEST_TO_COMPARE = 5
LEAST_SPREAD = 0.02  # relative; where more than half of the cases are equal, the robust deviation would be 0
TO_SD = 1.4826  # of the median absolute deviation, for a normal distribution


@dataclass(frozen=True)
class ChannelHistogram:
    """Intensities of one channel over the sampled foreground voxels of all cases.

    Attributes:
        edges: (bins + 1,) of the bins.
        counts: (classes, bins + 2) samples of each class; the first and the last lie beyond the bins.
        foreground: (bins + 2,) samples of any class.
        typical: (classes,) median over the cases of the class's mean in the case; NaN without a sample.
    """

    edges: np.ndarray
    counts: np.ndarray
    foreground: np.ndarray
    typical: np.ndarray

    @property
    def beyond(self) -> float:
        """Share of the foreground that lies outside the bins."""
        return float(self.foreground[[0, -1]].sum() / max(int(self.foreground.sum()), 1))

    def medians(self) -> np.ndarray:
        """(classes,) middle of the bin that holds the class's median, at most the outer edges; NaN without samples."""
        total = self.counts.sum(axis=1)
        at = (np.cumsum(self.counts, axis=1) >= total[:, None] / 2).argmax(axis=1)
        middles = np.concatenate([self.edges[:1], (self.edges[1:] + self.edges[:-1]) / 2, self.edges[-1:]])
        return np.where(total > 0, middles[at], np.nan)


@dataclass(frozen=True)
class ClassSizes:
    """How often and how large the classes are.

    Attributes:
        cases: (classes,) cases in which each occurs.
        voxels: (classes,) median voxels over the cases in which it occurs; NaN when there are none.
        volume_ml: (classes,) median volume over these cases, millilitres.
    """

    cases: np.ndarray
    voxels: np.ndarray
    volume_ml: np.ndarray


@dataclass(frozen=True)
class Outlier:
    """A case that is unlike the others in one property."""

    case: str
    what: str
    value: float
    median: float
    deviations: float  # robust standard deviations, with sign


def matching_readings(cases: Sequence[CaseFingerprint], readings: Sequence[CaseReading]) -> list[CaseReading]:
    """The readings of these cases, in their order; cases without one are left out."""
    by_name = {reading.sizes.name: reading for reading in readings if reading.sizes is not None}
    found = [by_name.get(case.name) for case in cases]
    return [r for r, case in zip(found, cases, strict=True) if r is not None and r.sizes == case]


def class_sizes(readings: Sequence[CaseReading], scheme: LabelScheme) -> ClassSizes:
    """Cases, voxels and volume of every class or region, in the order of dataset.json."""
    counts = np.zeros((len(readings), len(scheme.values) + 1))
    for row, reading in zip(counts, readings, strict=True):
        row[list(reading.voxels)] = list(reading.voxels.values())
    voxel_ml = np.array([np.prod(r.sizes.spacing_mm) for r in readings if r.sizes is not None]) / 1000
    cases, voxels, volumes = [], [], []
    for members in scheme.region_table:
        of_class = counts[:, members].sum(axis=1)
        present = of_class > 0
        cases.append(int(present.sum()))
        voxels.append(float(np.median(of_class[present])) if present.any() else np.nan)
        volumes.append(float(np.median((of_class * voxel_ml)[present])) if present.any() else np.nan)
    return ClassSizes(np.array(cases), np.array(voxels), np.array(volumes))


def channel_histograms(
    readings: Sequence[CaseReading],
    scheme: LabelScheme,
    intensities: Sequence[IntensityStatistics],
    normalization: Sequence[ChannelNormalization],
    samples: int,
) -> list[ChannelHistogram]:
    """Histograms of every channel, of all foreground and of each class or region.

    Args:
        readings: of all cases.
        scheme: what the label indices mean.
        intensities: of the fingerprint; they decide the range.
        normalization: one per channel; its clip lies within the range.
        samples: how many of each case count, as in the fingerprint.
    """
    return [
        _histogram(readings, scheme, samples, channel, _edges(readings, samples, channel, statistics, plan))
        for channel, (statistics, plan) in enumerate(zip(intensities, normalization, strict=True))
    ]


def find_outliers(
    cases: Sequence[CaseFingerprint], readings: Sequence[CaseReading] = (), channels: Sequence[str] = ()
) -> list[Outlier]:
    """Cases that lie more than ``FAR`` robust standard deviations from the median, the farthest first.

    Size, spacing and extent of each axis are compared on a logarithmic scale, the mean foreground intensity of each
    channel on a linear one. Each case is listed once, with the property in which it is farthest. None among fewer
    than ``FEWEST_TO_COMPARE`` cases.

    Args:
        cases: of the fingerprint.
        readings: of the cases, for their intensities.
        channels: names.
    """
    if len(cases) < FEWEST_TO_COMPARE:
        return []
    names = [case.name for case in cases]
    shapes = np.array([case.shape for case in cases], dtype=float)
    spacings = np.array([case.spacing_mm for case in cases], dtype=float)
    found: list[Outlier] = []
    for axis, letter in enumerate("zyx"):
        found += _far(names, f"spacing {letter}, mm", spacings[:, axis], logarithmic=True)
        found += _far(names, f"size {letter}, voxels", shapes[:, axis], logarithmic=True)
        found += _far(names, f"extent {letter}, mm", shapes[:, axis] * spacings[:, axis], logarithmic=True)
    filled = [r for r in readings if len(r.sample_labels)]
    if len(filled) >= FEWEST_TO_COMPARE:
        filled_names = [r.sizes.name for r in filled if r.sizes is not None]
        means = np.array([r.samples.mean(axis=1, dtype=np.float64) for r in filled])
        for channel, column in zip(channels, means.T, strict=True):
            found += _far(filled_names, f"mean intensity, {channel}", column, logarithmic=False)
    found.sort(key=lambda outlier: (-round(abs(outlier.deviations), 6), outlier.case))  # an extent is no news
    farthest: dict[str, Outlier] = {}
    for outlier in found:
        farthest.setdefault(outlier.case, outlier)
    return list(farthest.values())


def choose_cases(cases: Sequence[CaseFingerprint]) -> list[tuple[CaseFingerprint, str]]:
    """Smallest, median and largest case by voxels (of equal ones by voxel size), each once, with that word."""

    def order(case: CaseFingerprint) -> tuple[float, float, str]:
        return float(np.prod(case.shape, dtype=float)), float(np.prod(case.spacing_mm)), case.name

    ranked = sorted(cases, key=order)
    if len(ranked) == 1:
        return [(ranked[0], "the only case")]
    if len(ranked) == 2:
        return [(ranked[0], "the smaller case"), (ranked[1], "the larger case")]
    return [(ranked[0], "smallest"), (ranked[len(ranked) // 2], "median"), (ranked[-1], "largest")]


def _far(names: Sequence[str], what: str, values: np.ndarray, logarithmic: bool) -> list[Outlier]:
    """Those of the values that lie far from the median, by the median absolute deviation."""
    scale = np.log(values) if logarithmic else values
    middle = float(np.median(scale))
    floor = LEAST_SPREAD if logarithmic else max(LEAST_SPREAD * abs(middle), 1e-9)
    spread = max(TO_SD * float(np.median(np.abs(scale - middle))), floor)
    deviations = (scale - middle) / spread
    typical = float(np.median(values))
    return [
        Outlier(names[k], what, float(values[k]), typical, float(deviations[k]))
        for k in map(int, np.flatnonzero(np.abs(deviations) > FAR))
    ]


def _histogram(
    readings: Sequence[CaseReading], scheme: LabelScheme, samples: int, channel: int, edges: np.ndarray
) -> ChannelHistogram:
    """Count the samples of one channel, some cases at a time."""
    rows, bins = len(scheme.values) + 1, len(edges) - 1
    members = scheme.region_table.astype(np.int64)
    counts = np.zeros((rows, bins + 2), dtype=np.int64)
    means = []
    for batch in _batches(readings, samples):
        values = np.concatenate([r.samples[channel, :samples] for r in batch]).astype(np.float64)
        labels = np.concatenate([r.sample_labels[:samples] for r in batch]).astype(np.int64)
        position = (values - edges[0]) * (bins / (edges[-1] - edges[0]))
        place = np.clip(np.floor(position) + 1, 0, bins + 1).astype(np.int64)
        counts += np.bincount(labels * (bins + 2) + place, minlength=counts.size).reshape(counts.shape)
        number = np.repeat(np.arange(len(batch)), [min(samples, len(r.sample_labels)) for r in batch])
        cells, shape = number * rows + labels, (len(batch), rows)
        found = np.bincount(cells, minlength=len(batch) * rows).reshape(shape) @ members.T
        sums = np.bincount(cells, weights=values, minlength=len(batch) * rows).reshape(shape) @ members.T
        means.append(np.where(found > 0, sums / np.maximum(found, 1), np.nan))
    per_case = np.concatenate(means)
    typical = [float(np.median(c[np.isfinite(c)])) if np.isfinite(c).any() else np.nan for c in per_case.T]
    return ChannelHistogram(edges, members @ counts, counts.sum(axis=0), np.array(typical))


def _batches(readings: Sequence[CaseReading], samples: int) -> list[list[CaseReading]]:
    """Readings in groups of about ``BATCH_SAMPLES`` samples."""
    batches: list[list[CaseReading]] = []
    room = 0
    for reading in readings:
        if room <= 0:
            batches.append([])
            room = BATCH_SAMPLES
        batches[-1].append(reading)
        room -= min(samples, len(reading.sample_labels))
    return batches


def _edges(
    readings: Sequence[CaseReading],
    samples: int,
    channel: int,
    statistics: IntensityStatistics,
    plan: ChannelNormalization,
) -> np.ndarray:
    """Bins from a little below the 0.5 percentile to a little above the 99.5; for whole numbers of whole widths.

    Where some cases are on quite another scale, the range ends ``TAILS`` interquartile ranges from the quartiles. It
    always holds the clip of the plan.
    """
    parts = [r.samples[channel, :samples] for r in readings]
    step = max(1, sum(map(len, parts)) // BATCH_SAMPLES)
    values = np.concatenate([part[::step] for part in parts])
    lower, upper = np.percentile(values, (25, 75)) if len(values) else (0.0, 0.0)
    low, high = statistics.percentile_00_5, statistics.percentile_99_5
    reach = REACH * (high - low)
    low, high = max(statistics.minimum, low - reach), min(statistics.maximum, high + reach)
    if upper > lower:
        low, high = max(low, lower - TAILS * (upper - lower)), min(high, upper + TAILS * (upper - lower))
    if plan.clip_low is not None and plan.clip_high is not None:
        beside = CLIP_MARGIN * (plan.clip_high - plan.clip_low)
        low, high = min(low, plan.clip_low - beside), max(high, plan.clip_high + beside)
    if (values == np.rint(values)).all():
        low, high = np.floor(low) - 0.5, np.ceil(high) + 0.5
        width = max(1.0, np.ceil((high - low) / BINS))
        return low + width * np.arange(np.ceil((high - low) / width) + 1)
    if high <= low:
        half = max(abs(low), 1.0) * 0.05
        return np.linspace(low - half, high + half, BINS + 1)
    margin = (high - low) * 1e-3  # the maximum itself lies inside
    return np.linspace(low - margin, high + margin, BINS + 1)
