"""The coil fields of the training images, which a model remembers: ETTA divides others out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ukbob_seg.parallel import map_cases
from ukbob_seg.preprocessing.intensity_field import Field, UsualField, find_field
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.records import case_files
from ukbob_seg.preprocessing.storage import open_array

CASES = 32  # that are looked at, evenly spread


def usual_fields(
    arrays: Path, names: Sequence[str], schemes: Sequence[ChannelNormalization], quiet: bool = False
) -> tuple[UsualField | None, ...]:
    """What fields training cases have in each channel; None for channels that are not z-scored.

    Args:
        arrays: preprocessed configuration folder.
        names: of the training cases.
        schemes: how each channel was normalised.
        quiet: no progress bar.
    """
    if not names or all(scheme.scheme != "zscore" for scheme in schemes):
        return (None,) * len(schemes)
    count = min(CASES, len(names))
    chosen = [names[i * len(names) // count] for i in range(count)]
    work = partial(_fields_of, arrays, tuple(schemes))
    rows = map_cases(work, chosen, description="intensity fields of training cases", quiet=quiet)
    return tuple(
        None if any(field is None for field in column) else UsualField.of(column)
        for column in zip(*rows, strict=True)
    )  # fmt: skip


def _fields_of(arrays: Path, schemes: tuple[ChannelNormalization, ...], name: str) -> list[Field | None]:
    """Of each channel of one case."""
    image = np.asarray(open_array(case_files(arrays, name)[0])[:])
    return [
        None if scheme.scheme != "zscore" else find_field(channel, channel != 0 if scheme.mask_nonzero else None)
        for channel, scheme in zip(image, schemes, strict=True)
    ]
