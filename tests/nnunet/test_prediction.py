"""Predictions of nnU-Net models against nnU-Net's pipeline written down plainly in tests/helpers/nnunet_models.py."""

import dataclasses

import numpy as np
import pytest
from nnunet_models import Reference, Tiny, scan, splines, write_model

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.inference.predictor import PredictionSettings, Predictor

pytest.importorskip("dynamic_network_architectures", reason="pip install --no-deps dynamic-network-architectures")

SPACING = (1.0, 1.3, 0.9)
# Voxels may differ where logits tie: float32 here, float64 there.
MOST_DIFFERENT = 2e-3


def agreement(found: np.ndarray, expected: np.ndarray, least_classes: int = 2) -> None:
    assert found.shape == expected.shape
    assert len(np.unique(expected)) > least_classes - 1  # a map of one value would agree with anything
    different = found != expected
    assert different.mean() < MOST_DIFFERENT
    for value in np.unique(expected):
        a, b = found == value, expected == value
        if b.sum() > 500:
            assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.999


def both(tiny: Tiny, tmp_path, image=None, spacing=SPACING, tta=False) -> tuple[np.ndarray, np.ndarray]:
    image = scan(channels=len(tiny.schemes)) if image is None else image
    folder = write_model(tiny, tmp_path)
    settings = PredictionSettings(tta=tta)
    with Predictor.from_model_folder(folder, settings=settings) as predictor:
        found = predictor.predict_array(image, Geometry(image.shape[1:], spacing)).labels
    return found, Reference(tiny).predict(image, spacing, mirror=tta)


MODELS = {
    "plain": Tiny(),
    "residual": Tiny(residual=True),
    "old plans": Tiny(old_plans=True),
    "old plans, residual": Tiny(old_plans=True, residual=True),
    "same spacing": Tiny(spacing=SPACING),
    "two folds": Tiny(folds=("0", "1")),
    "masked z-score": Tiny(masked=(True,)),
    "ct": Tiny(schemes=("CTNormalization",)),
    "channels": Tiny(
        seed=7,
        schemes=("RescaleTo01Normalization", "RGBTo01Normalization", "NoNormalization", "ZScoreNormalization"),
        masked=(False, False, False, True),
    ),
    "larger patch than image": Tiny(patch=(32, 12, 40)),
    "coarse target": Tiny(spacing=(4.5, 1.0, 0.8)),
    "linear across": Tiny(spacing=(4.5, 1.0, 0.8), resampling=splines(order_z=1)),
    "never apart": Tiny(spacing=(4.5, 1.0, 0.8), resampling=splines(force_separate_z=False)),
    "always apart": Tiny(resampling=splines(force_separate_z=True)),
    "regions": Tiny(labels={"background": 0, "whole": [1, 2], "core": [2]}, regions_order=(1, 2)),
    "regions, other order": Tiny(
        labels={"background": 0, "core": [2], "whole": [1, 2, 3], "edge": 3}, regions_order=(2, 1, 3)
    ),
    "ignore label": Tiny(labels={"background": 0, "first": 1, "second": 2, "ignore": 3}),
    "2d": Tiny(configuration="2d", spacing=(1.0, 0.8), patch=(12, 10), mirror=(0, 1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_segmentation_is_nnunets(name, tmp_path):
    agreement(*both(MODELS[name], tmp_path))


@pytest.mark.parametrize("forward", [(1, 0, 2), (2, 0, 1), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("flat", [False, True])
def test_transposed_axes(forward, flat, tmp_path):
    """Kernels and strides differ by axis, so that a wrong exchange gives another segmentation."""
    tiny = Tiny(forward=forward)
    if flat:
        tiny = Tiny(configuration="2d", spacing=(1.0, 0.8), patch=(12, 10), forward=forward, mirror=(0, 1))
    agreement(*both(tiny, tmp_path))


@pytest.mark.parametrize("forward", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("axes", [(0,), (1, 2)])
def test_mirroring_along_the_axes_of_training(forward, axes, tmp_path):
    tiny = Tiny(forward=forward, mirror=axes)
    found, expected = both(tiny, tmp_path, tta=True)
    agreement(found, expected)
    plain = Reference(tiny).predict(scan(), SPACING)
    assert (plain != expected).mean() > 10 * MOST_DIFFERENT  # flips show


def test_left_and_right_are_not_exchanged_when_mirroring(tmp_path):
    """nnU-Net flips label maps as they are, so its networks learn sides by where they are in the image."""
    tiny = Tiny(labels={"background": 0, "kidney_left": 1, "kidney_right": 2})
    agreement(*both(tiny, tmp_path, tta=True))


def test_tta_without_mirroring_changes_nothing(tmp_path, caplog):
    found, expected = both(Tiny(mirror=None), tmp_path, tta=True)
    agreement(found, expected)
    assert "without mirroring" in caplog.text


@pytest.mark.parametrize("spacing", [(5.0, 1.3, 0.9), (1.0, 1.3, 6.0), (1.0, 5.0, 5.0)])
def test_anisotropic_images(spacing, tmp_path):
    """A coarse axis is resampled by itself, and with two of them none is."""
    agreement(*both(Tiny(), tmp_path, scan((13, 17, 11)), spacing))


def test_an_image_and_a_target_that_are_coarse_along_different_axes(tmp_path):
    """nnU-Net asks the spacing that it resamples from first, so images and logits go apart along different axes."""
    agreement(*both(Tiny(spacing=(4.5, 1.0, 1.1)), tmp_path, scan((25, 17, 11)), (1.0, 1.2, 4.6)))


def test_overshooting_splines_are_cut(tmp_path):
    """An image of two values, upsampled: without the cut its edges ring by a tenth of their height."""
    image = np.full((1, 12, 14, 10), 10, dtype=np.float32)
    image[:, 3:8, 4:10, 2:7] = 250
    tiny = Tiny(spacing=(0.6, 0.6, 0.6), schemes=("NoNormalization",))
    folder = write_model(tiny, tmp_path)
    with Predictor.from_model_folder(folder) as predictor:
        array, _ = predictor._prepare(image, Geometry((12, 14, 10), (1.0, 1.0, 1.0)), None)
    assert array.min() >= 10
    assert array.max() <= 250
    assert array.shape == (1, 20, 23, 17)
    agreement(*both(tiny, tmp_path / "again", image, (1.0, 1.0, 1.0)))


@pytest.mark.parametrize("spacing", [SPACING, (5.0, 1.3, 0.9)])
@pytest.mark.parametrize("regions", [False, True])
def test_cascade(spacing, regions, tmp_path):
    """The second stage is given the first stage's label map on its own grid; the first stage lies beside it."""
    labels = {"background": 0, "whole": [1, 2], "core": [2]} if regions else dict(Tiny().labels)
    order = (1, 2) if regions else None
    first = Tiny(configuration="3d_lowres", spacing=(1.9, 1.7, 1.5), labels=labels, regions_order=order, seed=5)
    second = Tiny(configuration="3d_cascade_fullres", previous="3d_lowres", labels=labels, regions_order=order)
    write_model(first, tmp_path)
    folder = write_model(second, tmp_path)
    image = scan()
    with Predictor.from_model_folder(folder) as predictor:
        prediction = predictor.predict_array(image, Geometry(image.shape[1:], spacing))
    reference = Reference(second, Reference(first))
    agreement(prediction.previous_stage.labels, Reference(first).predict(image, spacing))
    agreement(prediction.labels, reference.predict(image, spacing))


def test_probabilities_are_those_of_the_pipeline(tmp_path):
    from ukbob_seg.preprocessing.storage import open_array

    tiny, image = Tiny(), scan()
    folder = write_model(tiny, tmp_path)
    with Predictor.from_model_folder(folder) as predictor:
        predictor.predict_array(image, Geometry(image.shape[1:], SPACING), tmp_path / "case.b2nd")
    logits, box, _ = Reference(tiny).logits(image, SPACING, mirror=False)
    expected = np.exp(logits) / np.exp(logits).sum(axis=0)
    found = open_array(tmp_path / "case.b2nd")[(slice(None), *box)]
    # Windows' weights are at least 1e-3 here, where nnU-Net's fall to 1e-8 in corners.
    assert np.abs(found - expected).max() < 0.02
    assert np.abs(found - expected).mean() < 1e-3


def test_etta_adapts_and_restores(tmp_path):
    from ukbob_seg.inference.etta_config import EttaConfig

    tiny, image = Tiny(forward=(2, 0, 1)), scan()
    folder = write_model(tiny, tmp_path)
    geometry = Geometry(image.shape[1:], SPACING)
    with Predictor.from_model_folder(folder) as predictor:
        before = predictor.predict_array(image, geometry)
        adapted = predictor.with_settings(PredictionSettings(etta=EttaConfig.of_mode("paper")))
        assert type(adapted) is type(predictor)
        found = adapted.predict_array(image, geometry)
        assert found.etta[0]["steps"] > 0
        assert not np.array_equal(found.labels, before.labels)
        assert np.array_equal(predictor.predict_array(image, geometry).labels, before.labels)


def test_classes_and_window_batches(tmp_path):
    tiny, image = Tiny(), scan()
    folder = write_model(tiny, tmp_path)
    geometry = Geometry(image.shape[1:], SPACING)
    with Predictor.from_model_folder(folder) as predictor:
        whole = predictor.predict_array(image, geometry).labels
        settings = PredictionSettings(classes=("second",), window_batch=3)
        some = predictor.with_settings(settings).predict_array(image, geometry).labels
    assert np.array_equal(some, np.where(whole == 2, 2, 0))
    assert dataclasses.is_dataclass(settings)
