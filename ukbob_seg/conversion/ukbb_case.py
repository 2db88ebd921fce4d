"""One subject's archive of Dixon stations to one image of four channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg.conversion.dicom_series import read_series
from ukbob_seg.conversion.dixon import CONTRASTS, FAT, WATER, Station, find_stations
from ukbob_seg.conversion.stitching import Block, Gain, chain_gains, common_grid, gain_between, overlap_of, stitch
from ukbob_seg.conversion.swaps import SwapVerdict, agreement, border_fat, decide_swaps
from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.errors import ConfigError, DatasetError


@dataclass(frozen=True)
class StitchOptions:
    """How archives are stitched.

    Attributes:
        stations: that an archive must have; None for any number.
        spacing_mm: of the result (z, y, x); None for the finest acquired, along each axis.
        repair_swaps: exchange water and fat of stations where they were found exchanged.
        manifest: an archive is incomplete when files are not there that its manifest lists.
    """

    stations: int | None = 6
    spacing_mm: tuple[float, float, float] | None = None
    repair_swaps: bool = False
    manifest: bool = True

    def __post_init__(self) -> None:
        if self.stations is not None and self.stations < 1:
            raise ConfigError(f"--stations must be at least 1, got {self.stations}")
        if self.spacing_mm is not None and not all(0 < value < float("inf") for value in self.spacing_mm):
            raise ConfigError(f"--spacing must be three positive numbers in mm, got {self.spacing_mm}")

    def to_json(self) -> dict[str, Any]:
        """As JSON keeps them, for records."""
        return {
            "stations": self.stations,
            "spacing_mm": None if self.spacing_mm is None else list(self.spacing_mm),
            "repair_swaps": self.repair_swaps,
            "manifest": self.manifest,
        }


@dataclass(frozen=True)
class StitchedCase:
    """What an archive holds.

    Attributes:
        image: (4, Z, Y, X) in the order of ``CONTRASTS``: uint16 where the scanner stored whole numbers, else float32;
            None for an incomplete archive.
        geometry: of the image.
        stations: a row of the table for each station.
        problems: why the archive is incomplete; empty when it is not.
        ignored: descriptions of series that are no Dixon contrast.
    """

    image: np.ndarray | None
    geometry: Geometry | None
    stations: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]
    ignored: tuple[str, ...] = field(default=())


def stitch_archive(source: Path, options: StitchOptions) -> StitchedCase:
    """Read an archive (or a folder of its files), check it, match and blend its stations.

    Raises:
        ConfigError: pydicom is not installed.
    """
    try:
        series, problems = read_series(source, options.manifest)
    except DatasetError as error:
        return StitchedCase(None, None, (), (str(error),))
    stations, found, ignored = find_stations(series, options.stations)
    problems = [*problems, *found]
    for station in stations:
        problems += [f"station {station.number}: {problem}" for problem in station.problems]
    rows = [_row(station) for station in stations]
    if not problems:
        try:
            blocks = [Block(station.voxels(), station.geometry) for station in stations]
            image, geometry, findings = _assemble(blocks, options)
        except DatasetError as error:
            problems = [str(error)]
        else:
            rows = [{**row, **finding} for row, finding in zip(rows, findings, strict=True)]
            return StitchedCase(image, geometry, tuple(rows), (), tuple(ignored))
    return StitchedCase(None, None, tuple(rows), tuple(problems), tuple(ignored))


def _row(station: Station) -> dict[str, Any]:
    """What the table says of a station before it is matched with others."""
    most = max(station.series.values(), key=lambda each: len(each.slices))
    return {
        "station": station.number,
        "top_mm": round(station.extent_mm[1], 2),
        "bottom_mm": round(station.extent_mm[0], 2),
        "slices": len(most.slices),
        "slice_spacing_mm": None if station.problems else round(station.geometry.spacing_mm[0], 4),
        "oblique_degrees": round(station.oblique_degrees, 2),
        "contrasts": " ".join(name for name in CONTRASTS if name in station.series),
        "duplicate_slices": station.duplicates,
        "repeated_series": station.repeated,
        "problems": "; ".join(station.problems),
    }


def _assemble(blocks: Sequence[Block], options: StitchOptions) -> tuple[np.ndarray, Geometry, list[dict[str, Any]]]:
    """Gains, exchanges, blend."""
    grid = common_grid([block.geometry for block in blocks], options.spacing_mm)
    steps: list[Gain] = []
    agreements: list[float] = []
    for above, below in pairwise(blocks):
        upper, lower = overlap_of(above, below, grid)
        step = gain_between(upper, lower)
        steps.append(step)
        agreements.append(agreement(upper, lower * np.float32(np.exp(step.log_ratio))))
    gains = chain_gains(steps)
    verdicts = decide_swaps([border_fat(block.voxels, block.geometry.spacing_mm) for block in blocks], agreements)
    if options.repair_swaps:
        blocks = [_exchanged(b) if verdict.swapped else b for b, verdict in zip(blocks, verdicts, strict=True)]
    whole = all(np.array_equal(block.voxels, np.rint(block.voxels)) for block in blocks)
    image = stitch(blocks, [float(gain) for gain in gains], grid)
    if whole and image.max() <= np.iinfo(np.uint16).max:
        image = np.rint(image).astype(np.uint16)
    findings = [
        _finding(k, gains, steps, verdicts[k], options.repair_swaps and verdicts[k].swapped) for k in range(len(blocks))
    ]
    return image, grid, findings


def _exchanged(block: Block) -> Block:
    voxels = block.voxels.copy()
    voxels[[FAT, WATER]] = voxels[[WATER, FAT]]
    return dataclasses.replace(block, voxels=voxels)


def _finding(k: int, gains: np.ndarray, steps: Sequence[Gain], verdict: SwapVerdict, repaired: bool) -> dict[str, Any]:
    step = steps[k] if k < len(steps) else None
    return {
        "gain": round(float(gains[k]), 5),
        "overlap_spread": None if step is None else _plain(step.spread),
        "overlap_voxels": None if step is None else step.voxels,
        "border_fat": _plain(verdict.border_fat),
        "agreement_below": _plain(verdict.agreement_below),
        "swapped": verdict.swapped,
        "swap_confidence": round(verdict.confidence, 4),
        "repaired": repaired,
    }


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)
