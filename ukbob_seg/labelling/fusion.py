"""One label map out of those of several channels of a scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError, listing
from ukbob_seg.filtering.components import connect, runs_of_labels
from ukbob_seg.inference.case_predictor import CasePredictor, Prediction, Progress
from ukbob_seg.inference.postprocessing import keep_largest
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.labelling.priorities import GROUPS, FusionGroup


def fuse(
    maps: Mapping[str, np.ndarray],
    values: Mapping[str, int],
    voxel_mm3: float,
    groups: Sequence[FusionGroup] = GROUPS,
) -> np.ndarray:
    """Merge label maps: each voxel has the label of the first group, and in it of the first channel, that claims it.

    Args:
        maps: (Z, Y, X) integers by channel name, in the order of preference; all of one shape.
        values: of the names in ``groups``; names that are not there are left out.
        voxel_mm3: volume of a voxel.
        groups: in the order of priority.

    Returns:
        (Z, Y, X) of the first map's type; 0 where no map has a label of any group.
    """
    cleaned = {name: clean(labels, values, voxel_mm3, groups) for name, labels in maps.items()}
    first = next(iter(cleaned.values()))
    result = np.zeros_like(first)
    size = max([int(labels.max()) for labels in cleaned.values()] + list(values.values())) + 1
    for group in groups:
        member = np.zeros(size, dtype=bool)
        member[[values[name] for name in (*group.single, *group.several) if name in values]] = True
        member[0] = False
        wanted = [name for name in cleaned if group.channels is not None and name in group.channels]
        for name in wanted or cleaned:  # without the channel that a group wants, all count
            labels = cleaned[name]
            np.copyto(result, labels, where=(result == 0) & member[labels])
    return result


def clean(
    labels: np.ndarray, values: Mapping[str, int], voxel_mm3: float, groups: Sequence[FusionGroup] = GROUPS
) -> np.ndarray:
    """A label map without stray pieces: the largest one of single structures, large enough ones of the others."""
    single = [values[name] for group in groups for name in group.single if name in values]
    least = {values[name]: group.least_mm3 / voxel_mm3 for group in groups for name in group.several if name in values}
    return drop_small(keep_largest(labels, single), least)


def drop_small(labels: np.ndarray, least: Mapping[int, float]) -> np.ndarray:
    """A copy without connected parts (26 neighbours) of fewer voxels than their label's least number."""
    runs = runs_of_labels(labels)
    root = connect(runs, diagonal=True)
    size = np.bincount(root, weights=runs.voxels, minlength=len(root))
    small = np.zeros(len(root), dtype=bool)
    for value, number in least.items():
        small |= (runs.value == value) & (size[root] < number)
    cleaned = labels.copy()
    if small.any():
        cleaned[runs.paint(small)] = 0
    return cleaned


class FusedPredictor(CasePredictor):
    """Predicts each channel of a scan with a model of one channel, and merges the label maps.

    Args:
        inner: of one channel.
        channels: names of the channels, in the order of the image's and of preference.
        values: label values by the names of ``priorities.GROUPS``.

    Raises:
        ConfigError: a model of several channels, or a label that no group has.
    """

    def __init__(self, inner: CasePredictor, channels: Sequence[str], values: Mapping[str, int]) -> None:
        if len(inner.spec.channel_names) != 1:
            raise ConfigError(f"--fuse needs a model of one channel, this one takes {len(inner.spec.channel_names)}")
        known = {name for group in GROUPS for name in (*group.single, *group.several)}
        strange = [name for name in values if name not in known]
        if strange or inner.spec.labels.has_regions:
            raise ConfigError(
                f"--fuse knows the structures of TotalVibeSegmentator alone, not {listing(strange) or 'regions'}; "
                "label one channel with --channel"
            )
        content = {**inner.spec.content, "channel_names": {str(k): name for k, name in enumerate(channels)}}
        self.spec = DatasetSpec.from_json(content, inner.spec.name)
        self.plans, self.settings, self.written = inner.plans, inner.settings, inner.written
        self._inner, self._values = inner, dict(values)

    def predict_array(
        self,
        image: np.ndarray,
        geometry: Geometry,
        probabilities: Path | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segment one image; see ``CasePredictor.predict_array``. There are no probabilities of merged maps."""
        if probabilities is not None:
            raise ConfigError("merged label maps have no probabilities; predict one channel for these")
        maps: dict[str, np.ndarray] = {}
        etta: list[dict[str, Any]] = []
        for number, name in enumerate(self.spec.channel_names):
            found = self._inner.predict_array(image[number : number + 1], geometry, None, progress)
            maps[name] = found.labels
            etta += [{"channel": name, **record} for record in found.etta]
        merged = fuse(maps, self._values, float(np.prod(geometry.spacing_mm)))
        return Prediction(merged, tuple(etta))

    def origin(self) -> list[str]:
        """As of the model."""
        return self._inner.origin()

    def checkpoint_files(self) -> list[Path]:
        """As of the model."""
        return self._inner.checkpoint_files()

    def with_settings(self, settings: PredictionSettings) -> FusedPredictor:
        """As of all predictors."""
        return FusedPredictor(self._inner.with_settings(settings), self.spec.channel_names, self._values)

    def close(self) -> None:
        """Let go of the model."""
        self._inner.close()
