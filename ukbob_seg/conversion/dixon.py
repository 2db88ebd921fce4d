"""From DICOM series to stations: which contrast a series is, which lie at one table position, what is missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ukbob_seg.conversion.acquisitions import choose_acquisition
from ukbob_seg.conversion.dicom_series import Series
from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.errors import DatasetError

CONTRASTS = ("fat", "water", "inphase", "outphase")  # the paper's channel order
FAT, WATER, INPHASE, OUTPHASE = range(4)

# Values of ImageType as Siemens, GE and Philips write them.
_IMAGE_TYPES = {
    "FAT": "fat", "F": "fat", "WATER": "water", "W": "water",
    "IN_PHASE": "inphase", "INPHASE": "inphase", "IP": "inphase",
    "OPP_PHASE": "outphase", "OPPOSED_PHASE": "outphase", "OUT_PHASE": "outphase", "OP": "outphase",
}  # fmt: skip
# The end of SeriesDescription: Dixon_BH_17s_W, Dixon_noBH_in, ...
_DESCRIPTION = re.compile(
    r"(?:^|[_\s-])(?:(?P<fat>f|fat)|(?P<water>w|water)|(?P<inphase>in|in_?phase)"
    r"|(?P<outphase>opp|out|opp_?phase|out_?phase))$",
    re.IGNORECASE,
)
_SAME_STATION = 0.6  # of the shorter of two series lies in the other; neighbouring stations share far less
_AXIAL = 0.9  # cosine to the patient's axis; more oblique stacks are no axial stations


@dataclass(frozen=True)
class Station:
    """One table position.

    Attributes:
        number: from 1, at the head.
        series: by contrast; those that are there.
        extent_mm: height of the lowest and the highest slice.
        repeated: series left out because the station was scanned, or sent, more than once.
        problems: why the station cannot be used; empty when it can.
    """

    number: int
    series: dict[str, Series]
    extent_mm: tuple[float, float]
    repeated: int
    problems: tuple[str, ...]

    @property
    def geometry(self) -> Geometry:
        """The grid that the four contrasts share, where there are no problems."""
        return self.series["inphase"].geometry

    @property
    def duplicates(self) -> int:
        """Slices that were in the archive twice."""
        return sum(each.duplicates for each in self.series.values())

    @property
    def oblique_degrees(self) -> float:
        """Between the direction of the slices and the patient's axis."""
        normal = next(iter(self.series.values())).slices[0].normal
        return float(np.degrees(np.arccos(min(1.0, abs(float(normal[2]))))))

    def voxels(self) -> np.ndarray:
        """(4, Z, Y, X) float32 in the order of ``CONTRASTS``.

        Raises:
            DatasetError: pixel data are damaged.
        """
        return np.stack([self.series[name].voxels() for name in CONTRASTS]).astype(np.float32)


def contrast_of(series: Series) -> str | None:
    """The contrast that ImageType and the end of SeriesDescription name; None when neither names one.

    Raises:
        DatasetError: they name different ones.
    """
    typed = {_IMAGE_TYPES[value.upper()] for value in series.image_type if value.upper() in _IMAGE_TYPES}
    match = _DESCRIPTION.search(series.description)
    described = {match.lastgroup} if match is not None and match.lastgroup else set()
    named = typed | described
    if len(named) > 1:
        raise DatasetError(
            f"series {series.number} ({series.description!r}) is {' and '.join(sorted(map(str, named)))} at once: "
            f"ImageType says {'/'.join(series.image_type)}"
        )
    return str(named.pop()) if named else None


def find_stations(series: Sequence[Series], expected: int | None) -> tuple[list[Station], list[str], list[str]]:
    """Group the series of one subject by table position, from head to knee.

    Files' names, series numbers and times play no part: a station is a set of series whose slices lie at one height.
    Times matter only where a station was scanned more than once (see ``choose_acquisition``).

    Args:
        series: of the archive.
        expected: number of stations, or None where any will do.

    Returns:
        (stations, problems of the whole, descriptions of series that are no Dixon contrast).
    """
    problems: list[str] = []
    ignored: list[str] = []
    dixon: list[tuple[str, Series]] = []
    for each in series:
        try:
            contrast = contrast_of(each)
        except DatasetError as error:
            problems.append(str(error))
            continue
        if contrast is None:
            ignored.append(each.description or f"series {each.number}")
        elif abs(each.slices[0].normal[2]) < _AXIAL:
            problems.append(f"series {each.number} ({each.description!r}) is not axial")
        else:
            dixon.append((contrast, each))
    groups = _same_height(dixon)
    stations = [_station(number, group) for number, group in enumerate(groups, 1)]
    if expected is not None and len(stations) != expected:
        problems.append(f"{len(stations)} of {expected} stations are there")
    if not stations and not problems:
        problems.append("no series is a Dixon contrast")
    problems += _grid_problems(stations)
    return stations, problems, ignored


def _same_height(series: Sequence[tuple[str, Series]]) -> list[list[tuple[str, Series]]]:
    """Series whose slices lie at one height together, from head to feet."""
    groups: list[list[tuple[str, Series]]] = []
    for contrast, each in sorted(series, key=lambda item: -len(item[1].slices)):  # the most complete ones first
        home = next((group for group in groups if _shared(group[0][1], each) > _SAME_STATION), None)
        if home is None:
            groups.append([(contrast, each)])
        else:
            home.append((contrast, each))
    return sorted(groups, key=lambda group: -sum(_heights(group[0][1])))


def _heights(series: Series) -> tuple[float, float]:
    """Of the lowest and the highest slice, toward the head."""
    ends = [float(each.position_mm[2]) for each in (series.slices[0], series.slices[-1])]
    return min(ends), max(ends)


def _shared(one: Series, other: Series) -> float:
    """Part of the shorter series that lies at the height of the other."""
    (a, b), (c, d) = _heights(one), _heights(other)
    shorter = min(b - a, d - c)
    if shorter <= 0:  # a single slice
        return float(min(b, d) >= max(a, c))
    return (min(b, d) - max(a, c)) / shorter


def _station(number: int, group: Sequence[tuple[str, Series]]) -> Station:
    chosen, problems = choose_acquisition(group, CONTRASTS)
    ends = [height for each in chosen.values() for height in _heights(each)]
    return Station(number, chosen, (min(ends), max(ends)), len(group) - len(chosen), problems)


def _grid_problems(stations: Sequence[Station]) -> list[str]:
    """Stations that are turned against each other or leave a gap."""
    problems = []
    for above, below in pairwise(stations):
        if above.problems or below.problems:
            continue
        if not np.allclose(above.geometry.direction, below.geometry.direction, atol=1e-3):
            problems.append(f"stations {above.number} and {below.number} have different orientations")
        overlap = below.extent_mm[1] - above.extent_mm[0]
        thickest = max(above.geometry.spacing_mm[0], below.geometry.spacing_mm[0])
        if overlap < thickest:
            state = f"lie {-overlap:.1f} mm apart" if overlap < 0 else f"overlap by {overlap:.1f} mm only"
            problems.append(f"stations {above.number} and {below.number} {state}: a station is missing or was moved")
    return problems
