"""Test cases of a comparison of networks, predicted and scored by one fold's network."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from ukbob_seg.dataset.spec import group_channels
from ukbob_seg.errors import DatasetError, listing
from ukbob_seg.evaluation.evaluate import ReportOptions, evaluate_pairs
from ukbob_seg.evaluation.pairing import label_files
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.training.checkpoint import NAMES, read_checkpoint


def score_test_cases(
    folder: Path, images: Path, references: Path, device: str, checkpoint: str = "final", quiet: bool = False
) -> None:
    """Write ``fold_K/test/*`` with summary.json, metrics.csv and report.html.

    Args:
        folder: of the fold.
        images: folder of ``CASE_0000.ext`` files.
        references: folder of label files; these decide which cases count.
        device: where to predict.
        checkpoint: ``best`` or ``final``.
        quiet: no progress bar.

    Raises:
        DatasetError: an image is missing, or nothing to score.
    """
    spec = read_checkpoint(folder / NAMES[checkpoint])[0].spec()
    labels, grouped = label_files(references), group_channels(images, spec)
    if lacking := sorted(set(labels) - set(grouped.cases)):
        raise DatasetError(
            f"{len(lacking)} of {len(labels)} label files of {references} have no image CASE_0000{spec.file_ending} in "
            f"{images}: {listing(lacking)}"
        )
    output, settings = folder / "test", PredictionSettings(postprocessing=False)
    pairs = [(case, output / f"{case}{spec.file_ending}", label) for case, label in labels.items()]
    fold = folder.name.removeprefix("fold_")
    with Predictor.from_model_folder(folder.parent, [fold], checkpoint, device, settings) as predictor:
        for case, prediction, _ in tqdm(pairs, desc="test cases", unit="case", disable=quiet):
            predictor.predict_case(grouped.cases[case], prediction)
    evaluate_pairs(pairs, spec.labels, output, report=ReportOptions(images=images))
