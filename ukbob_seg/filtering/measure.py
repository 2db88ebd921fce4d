"""Features of every organ of every case, computed once and kept beside the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ukbob_seg.dataset.image_io import read_geometry, read_image, read_labels
from ukbob_seg.dataset.spec import Case, DatasetSpec
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import digest, read_json, write_json
from ukbob_seg.filtering.body import body_voxels
from ukbob_seg.filtering.shape_features import organ_features
from ukbob_seg.parallel import choose_workers, map_cases

BODY_IMAGE = "image"
BODY_UNION = "union"
_VERSION = 1  # raise it when the meaning of a feature changes: kept results are then computed again
_BYTES_PER_VOXEL = {BODY_IMAGE: 24, BODY_UNION: 8}


@dataclass(frozen=True)
class CaseMeasurement:
    """Measures one case and keeps the result in ``folder/CASE.json``; picklable, for worker processes.

    Attributes:
        folder: where the results of the single cases are kept.
        file_ending: of label and mask files.
        ignore_value: file value of the ignore label, which is no organ, or None.
        body: ``image``, ``union``, or a folder of masks CASE.ext whose nonzero voxels are the body.
    """

    folder: Path
    file_ending: str
    ignore_value: int | None
    body: str

    def kept(self, case: Case) -> dict[str, Any] | None:
        """The result kept from an earlier run, or None when there is none for exactly these files and options."""
        path = self._path(case)
        if not path.is_file():
            return None
        try:
            content = read_json(path)
        except DatasetError:
            return None
        return content if isinstance(content, dict) and content.get("key") == self.key(case) else None

    def key(self, case: Case) -> str:
        """Hash of what the result depends on: version, options, and size and modification time of the input files."""
        stats = [(path.name, path.stat()) for path in self._inputs(case)]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return digest([_VERSION, self.ignore_value, self._body_kind, files])

    def __call__(self, case: Case) -> dict[str, Any]:
        """Measure a case and keep the result.

        Raises:
            DatasetError: a file of the case cannot be read or does not fit; names the case.
        """
        key = self.key(case)
        try:
            table, body = self._measure(case)
        except DatasetError as error:
            raise DatasetError(f"case {case.name}: {error}") from error
        content = {"key": key, "body_voxels": body, "features": table.to_dict(orient="list")}
        write_json(self._path(case), content)
        return content

    @property
    def _body_kind(self) -> str:
        return self.body if self.body in (BODY_IMAGE, BODY_UNION) else "mask"

    def _path(self, case: Case) -> Path:
        return self.folder / f"{case.name}.json"

    def _inputs(self, case: Case) -> list[Path]:
        """Files that the result depends on: the label, then whatever the body is taken from."""
        assert case.label is not None
        if self.body == BODY_UNION:
            return [case.label]
        if self.body == BODY_IMAGE:
            return [case.label, case.images[0]]
        mask = Path(self.body) / f"{case.name}{self.file_ending}"
        if not mask.is_file():
            raise DatasetError(f"case {case.name}: no body mask {mask}; add it, or use --body image or --body union")
        return [case.label, mask]

    def _measure(self, case: Case) -> tuple[pd.DataFrame, int]:
        label_path, *body_path = self._inputs(case)
        labels, geometry = read_labels(label_path)
        table = organ_features(labels, geometry.spacing_mm)
        del labels  # the body needs as much again
        table = table[table["label"] != (-1 if self.ignore_value is None else self.ignore_value)]
        if self.body == BODY_UNION:
            body = int(table["voxels"].sum())
        else:
            if self.body == BODY_IMAGE:
                image, other = read_image(body_path)
                body = _named(body_path[0], image[0])
            else:
                mask, other = read_labels(body_path[0])
                body = int(np.count_nonzero(mask))
                if body == 0:
                    raise DatasetError(f"{body_path[0]} is empty: a body mask must have nonzero voxels")
            difference = geometry.difference(other, ("the label", body_path[0].name))
            if difference is not None:
                raise DatasetError(f"{difference}; resample one of them or correct its header")
        return table.assign(normalized_volume=table["voxels"] / max(body, 1)), body


def measure_cohort(
    cases: Sequence[Case], measurement: CaseMeasurement, workers: int | None = None, quiet: bool = False
) -> tuple[pd.DataFrame, int]:
    """Measure all cases, except those whose kept result still fits.

    Args:
        cases: with label files.
        measurement: how.
        workers: processes; None chooses by processors, memory and cases.
        quiet: no progress bar.

    Returns:
        (table, computed): one row per case and organ in the order of the cases and ascending by label, with the
        columns case, body_voxels and those of ``organ_features``; and how many cases were computed anew.

    Raises:
        DatasetError: a case cannot be measured; what was finished is kept.
    """
    results = {case.name: measurement.kept(case) for case in cases}
    pending = [case for case in cases if results[case.name] is None]
    if pending:
        _compile_kernel()
        count = choose_workers(workers, len(pending), _memory_per_case_gb(pending, measurement.body))
        computed = map_cases(measurement, pending, workers=count, description="measuring organs", quiet=quiet)
        results.update({case.name: result for case, result in zip(pending, computed, strict=True)})
    return _as_table([(case.name, results[case.name]) for case in cases]), len(pending)


def check_label_values(table: pd.DataFrame, spec: DatasetSpec) -> None:
    """Refuse labels that dataset.json does not name.

    Raises:
        DatasetError: lists cases, values and voxel counts.
    """
    wrong = table[~table["label"].isin(spec.labels.values)]
    if wrong.empty:
        return
    shown = [f"{row.case}: {row.label} ({row.voxels} voxels)" for row in wrong.head(10).itertuples()]
    more = f" and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
    raise DatasetError(
        f"label values that dataset.json does not name, by case: {', '.join(shown)}{more}; add them to 'labels' "
        "or correct the files"
    )


def _named(path: Path, image: np.ndarray) -> int:
    try:
        return body_voxels(image)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}; use --body union or a folder of masks") from error


def _compile_kernel() -> None:
    """Compile (or load) the kernel for the commonest dtype here, so that workers find it in the cache."""
    organ_features(np.zeros((1, 1, 1), np.uint8), (1.0, 1.0, 1.0))


def _memory_per_case_gb(cases: Sequence[Case], body: str) -> float:
    """Estimated peak of the case with the largest label file."""
    largest = max((case.label for case in cases if case.label is not None), key=lambda path: path.stat().st_size)
    voxels = float(np.prod(read_geometry(largest).shape))
    return 0.15 + voxels * _BYTES_PER_VOXEL.get(body, 12) / 2**30


def _as_table(results: Sequence[tuple[str, dict[str, Any] | None]]) -> pd.DataFrame:
    columns: dict[str, list[Any]] = {"case": [], "body_voxels": []}
    for name, result in results:
        assert result is not None
        features = result["features"]
        rows = len(features["label"])
        columns["case"].extend([name] * rows)
        columns["body_voxels"].extend([result["body_voxels"]] * rows)
        for column, values in features.items():
            columns.setdefault(column, []).extend(values)
    return pd.DataFrame(columns)
