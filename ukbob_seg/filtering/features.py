"""The features of a dataset's organs as one table: measured, named, and divided into strata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import Case, DatasetSpec, require_cases
from ukbob_seg.errors import DatasetError
from ukbob_seg.files import ensure_writable
from ukbob_seg.filtering.body import BODY_MASK, body_kind
from ukbob_seg.filtering.config import FilterConfig
from ukbob_seg.filtering.measure import (
    CaseMeasurement,
    CohortMeasurement,
    check_label_values,
    measure_cohort,
    refuse_failures,
)
from ukbob_seg.filtering.strata import WHOLE, read_strata
from ukbob_seg.parallel import Part

SHARDS_FOLDER = "shards"


@dataclass(frozen=True)
class Cohort:
    """A raw dataset as the filter sees it.

    Attributes:
        spec: of the dataset.
        cases: its training cases.
        folder: where the filter writes.
        config: the user's options.
        strata: stratum of every case.
    """

    spec: DatasetSpec
    cases: list[Case]
    folder: Path
    config: FilterConfig
    strata: dict[str, str]

    @classmethod
    def open(cls, raw_folder: Path, output_folder: Path, config: FilterConfig) -> Cohort:
        """Read dataset.json and the table of subjects, list the cases, and make sure that the folder can be written.

        Raises:
            UkbobError: any of this is not possible.
        """
        raw_folder, output_folder = Path(raw_folder).absolute(), Path(output_folder)
        spec = DatasetSpec.load(raw_folder)
        cases = require_cases(raw_folder, spec)
        names = [case.name for case in cases]
        strata = dict.fromkeys(names, WHOLE)
        if config.strata_file is not None:
            strata = read_strata(config.strata_file, config.strata_columns, names)
        ensure_writable(output_folder)
        return cls(spec, cases, output_folder, config, strata)

    @property
    def names(self) -> dict[int, str]:
        """Organ of every label value."""
        return organ_names(self.spec.labels)

    def measure(self, part: Part | None = None) -> CohortMeasurement:
        """Measure what is not known yet.

        Raises:
            DatasetError: cases cannot be measured, unless they are to be skipped.
        """
        config, ending = self.config, self.spec.file_ending
        # Absolute paths: a worker of a cluster may have been started in another folder.
        body = str(Path(config.body).absolute()) if body_kind(config.body) == BODY_MASK else config.body
        measurement = CaseMeasurement(ending, self.spec.labels.ignore_value, body, config.evidence)
        shards = (self.folder / SHARDS_FOLDER).absolute()
        measured = measure_cohort(shards, self.cases, measurement, config.workers, config.scheduler, config.quiet, part)
        if not config.skip_unreadable or len(measured.failures) == len(self.cases):
            refuse_failures(measured.failures, len(self.cases))
        return measured

    def features(self, measured: CohortMeasurement) -> pd.DataFrame:
        """The table of features with the columns organ and stratum.

        Raises:
            DatasetError: label values that dataset.json does not name, or no organ at all.
        """
        table = measured.table
        check_label_values(table, self.spec)
        if table.empty:
            raise DatasetError(
                f"{self.spec.name}: none of the {len(self.cases)} label maps holds an organ; nothing to filter"
            )
        table.insert(1, "organ", table["label"].map(self.names))
        table.insert(2, "stratum", table["case"].map(self.strata))
        return table


def organ_names(scheme: LabelScheme) -> dict[int, str]:
    """Name of every label value; members of overlapping regions have none of their own and get ``label N``."""
    if scheme.has_regions:
        return {value: f"label {value}" for value in scheme.values}
    return dict(zip(scheme.values, scheme.output_names[1:], strict=True))
