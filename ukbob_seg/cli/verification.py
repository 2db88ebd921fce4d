"""Check a raw dataset and report everything that is wrong with it."""

from __future__ import annotations

from ukbob_seg.dataset.paths import Roots, find_dataset
from ukbob_seg.errors import DatasetError


def verify_and_report(roots: Roots, dataset: str, workers: int | None, allow_empty: bool) -> None:
    """Print that all is well, or raise all problems as one error."""
    from ukbob_seg.dataset.spec import summarise_problems
    from ukbob_seg.dataset.verify import verify_dataset

    folder = find_dataset(roots.raw, dataset)
    problems = verify_dataset(folder, workers=workers or 1, allow_empty=allow_empty)
    if problems:
        raise DatasetError(summarise_problems(problems, most=len(problems)))
    print(f"{folder.name}: no problems")
