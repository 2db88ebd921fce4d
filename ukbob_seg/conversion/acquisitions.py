"""Series of one station that belong together: those of one acquisition, never of two."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ukbob_seg.conversion.dicom_series import Series

_SAME_S = 5.0  # images of one acquisition have one time; to scan a station again takes longer
_RECONSTRUCTIONS = frozenset({"ND", "DIS2D", "DIS3D", "NORM"})  # Siemens: distortion corrected or not, normalized

Named = tuple[str, Series]  # contrast, series


@dataclass(frozen=True)
class _Acquisition:
    """Series of one acquisition.

    Attributes:
        series: by contrast.
        name: for messages.
        problems: why it is no whole station; empty when it is.
    """

    series: dict[str, Series]
    name: str
    problems: tuple[str, ...]

    @property
    def slices(self) -> int:
        return max(len(each.slices) for each in self.series.values())


def choose_acquisition(group: Sequence[Named], contrasts: Sequence[str]) -> tuple[dict[str, Series], tuple[str, ...]]:
    """Of a station that may have been scanned several times the last whole acquisition.

    Series are of one acquisition that have one FrameOfReferenceUID and (to 5 s) one AcquisitionTime, or where that is
    missing one SeriesTime. Where a contrast is there twice even so, AcquisitionNumber and the kind of reconstruction
    (ImageType: distortion correction) part them. A whole acquisition has every contrast, regular, with equally many
    slices on one grid; of several, one that has fewer slices than another is not whole.

    Args:
        group: (contrast, series) at one height.
        contrasts: that a station must have.

    Returns:
        (series by contrast, problems: none where they are whole).
    """
    parts = sorted(_acquisitions(group), key=_order)
    found = [_acquisition(part, contrasts) for part in parts]
    whole = [each for each in found if not each.problems]
    if whole:
        most = max(each.slices for each in whole)
        return next(each for each in reversed(whole) if each.slices == most).series, ()
    if len(found) == 1:
        return found[0].series, found[0].problems
    said = "; ".join(f"{each.name}: {', '.join(each.problems)}" for each in found)
    fullest = max(found, key=lambda each: (len(each.series), each.slices))
    return fullest.series, (f"scanned {len(found)} times, never completely ({said})",)


def _acquisitions(group: Sequence[Named]) -> list[list[Named]]:
    parts = [part for frame in _by(group, lambda each: each.origin.frame) for part in _by_time(frame)]
    for key in (lambda each: each.origin.acquisition, _reconstruction):
        parts = [finer for part in parts for finer in (_by(part, key) if _repeated(part) else [part])]
    return parts


def _by(group: Sequence[Named], key: Callable[[Series], Hashable]) -> list[list[Named]]:
    parts: dict[Hashable, list[Named]] = {}
    for contrast, each in group:
        parts.setdefault(key(each), []).append((contrast, each))
    return list(parts.values())


def _moment(series: Series) -> float | None:
    return series.origin.started_s if series.acquired_s is None else series.acquired_s


def _by_time(group: Sequence[Named]) -> list[list[Named]]:
    """Parts between which more than 5 s lie; all together where some have no time to compare."""
    times = [each.acquired_s for _, each in group]
    if None in times:
        times = [each.origin.started_s for _, each in group]
    if None in times:
        return [list(group)]
    order = sorted(range(len(group)), key=lambda k: times[k] or 0.0)
    parts = [[group[order[0]]]]
    for before, k in itertools.pairwise(order):
        if (times[k] or 0.0) - (times[before] or 0.0) > _SAME_S:
            parts.append([])
        parts[-1].append(group[k])
    return parts


def _reconstruction(series: Series) -> Hashable:
    return frozenset(value.upper() for value in series.image_type) & _RECONSTRUCTIONS


def _repeated(group: Sequence[Named]) -> bool:
    return len({contrast for contrast, _ in group}) < len(group)


def _order(part: Sequence[Named]) -> tuple[float, int]:
    """Later ones last."""
    return max(_moment(each) or 0.0 for _, each in part), max(each.number for _, each in part)


def _acquisition(part: Sequence[Named], contrasts: Sequence[str]) -> _Acquisition:
    chosen: dict[str, Series] = {}
    problems: list[str] = []
    for contrast in contrasts:
        same = sorted((each for name, each in part if name == contrast), key=lambda each: each.number)
        if same:
            chosen[contrast] = same[-1]
        if any(not each.same_pixels(same[-1]) for each in same[:-1]):
            problems.append(
                f"{contrast} is there {len(same)} times, and no AcquisitionTime, SeriesTime or AcquisitionNumber tells "
                "which series belong together"
            )
    return _Acquisition(chosen, _name(part), tuple(problems + _problems(chosen, contrasts)))


def _problems(chosen: dict[str, Series], contrasts: Sequence[str]) -> list[str]:
    """Why series are no whole station on one grid."""
    missing = [name for name in contrasts if name not in chosen]
    problems = [f"{', '.join(missing)} missing"] if missing else []
    for name, each in chosen.items():
        problems += [f"{name}: {problem}" for problem in each.problems]
    most = max(len(each.slices) for each in chosen.values())
    problems += [
        f"{name}: {len(each.slices)} slices, {most} in another contrast"
        for name, each in chosen.items()
        if len(each.slices) < most and not each.problems
    ]
    if not problems:
        first = next(iter(chosen))
        for name, each in chosen.items():
            difference = chosen[first].geometry.difference(each.geometry, (first, name))
            if difference is not None:
                problems.append(difference)
    return problems


def _name(part: Sequence[Named]) -> str:
    moment = _moment(part[0][1])
    if moment is None:
        return "series " + ", ".join(str(number) for number in sorted(each.number for _, each in part))
    seconds = int(moment) % 86400
    return f"at {seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
