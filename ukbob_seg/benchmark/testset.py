"""Which test images a challenge has: what must be in a submission, no more and no less."""

from __future__ import annotations

from pathlib import Path

from ukbob_seg.benchmark.protocol import SubmissionRules, files_matching
from ukbob_seg.errors import ConfigError, DatasetError


def find_test_images(rules: SubmissionRules, folder: Path, modality: str | None = None) -> dict[str, Path]:
    """The image file of every test case, by the challenge's id.

    Args:
        rules: of the challenge.
        folder: of the test images, in the challenge's layout or the converted one; case folders in it are looked into.
        modality: where the challenge has several; None is ``mri``.

    Raises:
        ConfigError: a modality where there is none to choose.
        DatasetError: no images.
    """
    if modality is not None and rules.has_modality is None:
        raise ConfigError("--modality does not apply to this challenge; remove it")
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"image folder {folder} does not exist; give the folder of the test images")
    found = files_matching(folder, rules.image)
    if not found:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            found.update(files_matching(inner, rules.image))
    if rules.has_modality is not None:
        chosen = modality or "mri"
        found = {case: path for case, path in found.items() if rules.has_modality(case, chosen)}
    if not found:
        example = f" of --modality {modality or 'mri'}" if rules.has_modality is not None else ""
        raise DatasetError(f"{folder} holds no test image{example}; expected names like {rules.image_names}")
    return found
