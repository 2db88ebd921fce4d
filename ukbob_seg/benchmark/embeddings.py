"""Class embeddings of a trained model: the mean of the last feature map over the voxels of each class of each case."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ukbob_seg.benchmark.embeddings_features import class_features, features_of
from ukbob_seg.dataset.image_io import Geometry, read_image, read_labels
from ukbob_seg.errors import CheckpointError, ConfigError, DatasetError, listing
from ukbob_seg.files import atomic_path, digest, ensure_writable, file_sha256, read_json, write_json
from ukbob_seg.inference.case_predictor import Progress
from ukbob_seg.inference.model_folder import find_folds
from ukbob_seg.inference.predict import find_jobs
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.inference.settings import PredictionSettings
from ukbob_seg.inference.sliding_window import WindowSettings
from ukbob_seg.preprocessing.preprocessor import preprocess_image, preprocess_labels
from ukbob_seg.training.checkpoint import NAMES, ModelDescription, load_network

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
TABLE, CASES = "embeddings.parquet", "cases"
PREDICTION = "prediction"


@dataclass(frozen=True)
class EmbeddingCase:
    """A case: its channel files, and its reference labels, None where the model's prediction says what is what."""

    name: str
    images: tuple[Path, ...]
    reference: Path | None = None


class EmbeddingModel:
    """One network of a trained model, which gives a case's class embeddings.

    Args:
        network: in evaluation mode on ``device``.
        description: of its checkpoint.
        device: where it is.
        settings: ``step`` and ``window_batch`` count, as for predictions.
        previous_stage: predictor of a cascade's first stage.
        checkpoints: that all of it came from.

    Raises:
        ConfigError: the network has no segmentation head.
    """

    def __init__(
        self,
        network: nn.Module,
        description: ModelDescription,
        device: str = "cpu",
        settings: PredictionSettings | None = None,
        previous_stage: Predictor | None = None,
        checkpoints: Sequence[Path] = (),
    ) -> None:
        self.settings = settings or PredictionSettings(postprocessing=False)
        self.description, self.spec, self.plans = description, description.spec(), description.parsed_plans()
        self.checkpoints = tuple(checkpoints)
        self._network, self._device, self._previous_stage = network, device, previous_stage
        self._predictor = Predictor([network], description, device, self.settings, previous_stage)
        self._configuration = self.plans.configuration(description.configuration)
        plan = self._configuration.network(description.network)
        self._windows = WindowSettings(
            plan.patch_size, self.settings.step, self.settings.window_batch, self._configuration.slice_axis
        )
        channels = len(self.spec.channel_names) + (previous_stage is not None)
        window = self._windows.window(plan.patch_size)
        self._example = torch.zeros((1, channels, *window), device=device)
        with features_of(network, self._example, self.spec.labels.num_outputs):
            pass  # or say at once that it has no head

    @classmethod
    def load(
        cls,
        folder: Path,
        fold: str | None = None,
        checkpoint: str = "best",
        device: str = "cpu",
        settings: PredictionSettings | None = None,
    ) -> Self:
        """One fold of a model folder (``CONFIG__NETWORK``), in a cascade with that fold of the stages before.

        Args:
            folder: of the model.
            fold: which; None for the only one that was trained. Folds have features of their own, that no average
                would make sense of.
            checkpoint: ``best`` or ``final``.
            device: where to work.
            settings: how windows slide.

        Raises:
            CheckpointError: no such fold, or several to choose from.
        """
        found = find_folds(folder, checkpoint)
        if fold is None and len(found) > 1:
            raise ConfigError(
                f"{folder} has folds {', '.join(sorted(found))}, each with features of its own; choose one with -f"
            )
        chosen = fold or next(iter(found), None)
        if chosen not in found:
            raise CheckpointError(
                f"{folder} has no {NAMES[checkpoint]} for fold {chosen or 'any'} "
                f"(trained: {', '.join(sorted(found)) or 'none'})"
            )
        settings = settings or PredictionSettings(postprocessing=False)
        network, description = load_network(found[chosen], device)
        checkpoints, previous = [found[chosen]], None
        stage = description.parsed_plans().configuration(description.configuration).previous_stage
        if stage is not None:
            beside = folder.resolve().with_name(f"{stage}__{description.network.replace(':', '.')}")
            previous = Predictor.from_model_folder(beside, [chosen], checkpoint, device, settings, [chosen])
            checkpoints += map(Path, previous.origin())
        log.info("model %s, fold %s (%s)", folder, chosen, NAMES[checkpoint])
        return cls(network, description, device, settings, previous, checkpoints)

    def embed(self, case: EmbeddingCase, progress: Progress | None = None) -> dict[str, tuple[int, np.ndarray]]:
        """Class or region -> (voxels at the network's resolution, (F,) float64 mean features), absent ones left out.

        Args:
            case: files.
            progress: called with (windows done, windows in all), of the prediction and then of the features.

        Raises:
            DatasetError: image or labels cannot be read, or do not belong together.
        """
        image, geometry = read_image(case.images)
        if not np.isfinite(image).all():
            raise DatasetError(
                f"case {case.name}: the image has NaN or infinite voxels; replace them (for example by 0)"
            )
        array, properties = preprocess_image(image, geometry, self.plans, self._configuration)
        channels = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        scheme = self.spec.labels
        if self._previous_stage is not None:
            first = self._previous_stage.predict_array(image, geometry).labels
            indices = preprocess_labels(scheme.to_indices(first, "the first stage"), properties)
            extra = torch.from_numpy(indices.astype(np.float32))[None].to(self._device)
            channels = torch.cat([channels, extra])
        values = self._values(case, image, geometry, progress)
        labels = preprocess_labels(scheme.to_indices(values, f"case {case.name}"), properties)
        with features_of(self._network, self._example, scheme.num_outputs) as features:
            voxels, means = class_features(features, channels, labels, len(scheme.values), self._windows, progress)
        return _of_regions(scheme.names, scheme.region_table[:, 1:], voxels, means)

    def _values(
        self, case: EmbeddingCase, image: np.ndarray, geometry: Geometry, progress: Progress | None
    ) -> np.ndarray:
        """(Z, Y, X) label values of dataset.json on the file's grid."""
        if case.reference is None:
            return self._predictor.predict_array(image, geometry, progress=progress).labels
        values, grid = read_labels(case.reference)
        difference = geometry.difference(grid, ("the image", case.reference.name))
        if difference is not None:
            raise DatasetError(f"case {case.name}: {difference}; resample one of them or correct its header")
        return values

    def key(self, case: EmbeddingCase) -> str:
        """Hash of all that decides a case's embeddings: checkpoints, windows, the files as size and time tell."""
        files = [*case.images, *([] if case.reference is None else [case.reference])]
        stamps = [[str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]
        models = [file_sha256(path) for path in self.checkpoints]
        return digest([FORMAT_VERSION, models, self.settings.step, stamps])


def _of_regions(
    names: Sequence[str], table: np.ndarray, voxels: np.ndarray, means: np.ndarray
) -> dict[str, tuple[int, np.ndarray]]:
    """Classes, or regions as unions of label values, from the means of the values.

    Args:
        names: N, in reporting order.
        table: (N, K) bool, which values belong to each name.
        voxels: (K,) of the values.
        means: (K, F), NaN for values without voxels.
    """
    sums = np.nan_to_num(means) * voxels[:, None]
    found = {}
    for name, members in zip(names, table, strict=True):
        count = int(voxels[members].sum())
        if count:
            found[name] = count, sums[members].sum(axis=0) / count
    return found


def find_cases(source: Path, references: Path | None, of: str, model: EmbeddingModel) -> list[EmbeddingCase]:
    """The cases of a folder of images, or one file, with their reference labels.

    Args:
        source: as for ``ukbob_predict``.
        references: folder of label maps named ``CASE.ext``; None for the one beside the images (imagesTs: labelsTs).
        of: ``reference``, or ``prediction``, which needs no labels.
        model: channels and file ending.

    Raises:
        DatasetError: no images, or cases without labels; names them.
    """
    jobs = find_jobs(source, source.parent / "nowhere", model.spec)
    if of == PREDICTION:
        return [EmbeddingCase(job.name, job.images) for job in jobs]
    folder = references or _beside(source if source.is_dir() else source.parent)
    cases = [EmbeddingCase(job.name, job.images, folder / f"{job.name}{model.spec.file_ending}") for job in jobs]
    lacking = [case.name for case in cases if case.reference is not None and not case.reference.is_file()]
    if lacking:
        raise DatasetError(
            f"{len(lacking)} of {len(cases)} cases have no label file in {folder}: {listing(lacking, 5)}; give the "
            "folder with --references, or take what the model predicts (--of prediction)"
        )
    return cases


def _beside(images: Path) -> Path:
    name = images.resolve().name
    if name.startswith("images"):
        return images.resolve().with_name(f"labels{name.removeprefix('images')}")
    raise ConfigError(
        f"which labels belong to {images} is not known; give their folder with --references, or take what the model "
        "predicts (--of prediction)"
    )


def embed_cases(
    model: EmbeddingModel, cases: Sequence[EmbeddingCase], output: Path, quiet: bool = False
) -> pd.DataFrame:
    """Embed all cases, going on where an earlier run stopped, and write ``embeddings.parquet``.

    Args:
        model: to embed with.
        cases: at least one.
        output: folder; ``cases/CASE.json`` is a finished case's.
        quiet: no progress bar.

    Returns:
        One row per case and class present: case, class, voxels, features (F float32 numbers).

    Raises:
        DatasetError: a case cannot be read; finished ones are kept.
    """
    ensure_writable(output / CASES)
    rows = []
    bar = tqdm(cases, desc="embedding", unit="case", disable=quiet)
    for case in bar:
        path, key = output / CASES / f"{case.name}.json", model.key(case)
        classes = _stored(path, key)
        if classes is None:
            found = model.embed(case, partial(_show, bar, case.name))
            classes = {name: {"voxels": n, "features": mean.tolist()} for name, (n, mean) in found.items()}
            write_json(path, {"key": key, "classes": classes}, indent=None)
        rows += [
            {
                "case": case.name,
                "class": name,
                "voxels": entry["voxels"],
                "features": np.asarray(entry["features"], np.float32),
            }
            for name, entry in classes.items()
        ]
    table = pd.DataFrame(rows, columns=["case", "class", "voxels", "features"])
    with atomic_path(output / TABLE) as temporary:
        table.to_parquet(temporary, index=False)
    return table


def _show(bar: tqdm, name: str, done: int, total: int) -> None:
    bar.set_postfix_str(f"{name}: window {done}/{total}", refresh=total > 8)


def _stored(path: Path, key: str) -> Mapping[str, Any] | None:
    """What an earlier run found for a case; None where there is nothing, or of other files or another model."""
    if not path.is_file():
        return None
    try:
        content = read_json(path, "embeddings of a case")
        return content["classes"] if content["key"] == key else None
    except (DatasetError, KeyError, TypeError):
        return None
