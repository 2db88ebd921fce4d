"""What a model remembers of its training images' coil fields."""

import dataclasses

import numpy as np
import pytest
from field_images import coil, tissues

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.inference.etta_config import EttaConfig
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.preprocessing.intensity_field import TERMS, UsualField, find_field
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.records import case_files
from ukbob_seg.preprocessing.storage import open_array, save_array
from ukbob_seg.training import usual_fields as module
from ukbob_seg.training.checkpoint import ModelDescription
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.trainer import RunOptions, train
from ukbob_seg.training.usual_fields import usual_fields

ZSCORE, CT = ChannelNormalization("zscore"), ChannelNormalization("ct", -100, 300, 50, 60)


@pytest.fixture
def images(tmp_path):
    """Three cases of two channels; the second has a coil's field, and a border of zeros."""
    images = {}
    for seed in range(3):
        clean = tissues((20, 22, 18), seed)
        second = np.pad((clean * coil(clean.shape))[1:-1, 1:-1, 1:-1], 1)
        images[f"c{seed}"] = np.stack([clean, second]).astype(np.float32)
        save_array(case_files(tmp_path, f"c{seed}")[0], images[f"c{seed}"], (8, 8, 8))
    return images


def test_mean_and_farthest_of_each_channel(tmp_path, images):
    masked = ChannelNormalization("zscore", mask_nonzero=True)
    first, second = usual_fields(tmp_path, list(images), [ZSCORE, masked], quiet=True)
    assert first == UsualField.of([find_field(image[0]) for image in images.values()])
    assert second == UsualField.of([find_field(image[1], image[1] != 0) for image in images.values()])
    assert second.spread < first.spread + 0.2
    assert np.abs(second.weights).max() > 2 * np.abs(first.weights).max()


def test_channels_with_a_scale_of_their_own_have_none(tmp_path, images):
    assert usual_fields(tmp_path, list(images), [CT, ZSCORE], quiet=True)[0] is None
    assert usual_fields(tmp_path / "nowhere", list(images), [CT, CT], quiet=True) == (None, None)  # nothing is read


def test_some_cases_stand_for_all(tmp_path, images, monkeypatch):
    monkeypatch.setattr(module, "CASES", 2)
    field, _ = usual_fields(tmp_path, ["c0", "absent", "c1", "absent"], [ZSCORE, ZSCORE], quiet=True)
    assert field == UsualField.of([find_field(images[name][0]) for name in ("c0", "c1")])


def test_checkpoints_keep_it():
    fields = (UsualField(tuple(np.linspace(0, 1, len(TERMS)).tolist()), 0.25), None)
    description = ModelDescription("x", {}, "3d_fullres", "0", "softmax", (), {}, {}, fields)
    content = description.to_json()
    assert ModelDescription.from_json(content).fields == fields
    assert dataclasses.replace(description, fields=None) == description  # folds differ in it, and are one model
    for before in ([{"weights": [0.1] * 19, "spread": 0.2}, None], None):  # of other polynomials; of none
        assert ModelDescription.from_json({**content, "fields": before}).fields is None
    del content["fields"]
    assert ModelDescription.from_json(content).fields is None


def test_training_writes_it_and_prediction_reads_it(roots):
    config = TrainingConfig(epochs=1, iterations_per_epoch=1, validation_every=1, validation_cases=1)
    fold = train(7, "all", roots, config, RunOptions(quiet=True), network="tests_tiny:Tiny")
    arrays = roots.preprocessed / "Dataset007_Blobs" / "3d_fullres"
    images = [open_array(case_files(arrays, f"blob_{number:03d}")[0])[:] for number in range(5)]
    expected = (UsualField.of([find_field(np.asarray(image[0])) for image in images]),)
    with Predictor.from_model_folder(fold.parent, checkpoint="final") as predictor:
        assert predictor.description.fields == expected
        record = predictor.predict_array(images[0], Geometry(images[0].shape[1:], (1.0, 1.0, 1.0))).etta
    assert record == ()
    settings = PredictionSettings(etta=EttaConfig(steps=1))
    with Predictor.from_model_folder(fold.parent, checkpoint="final", settings=settings) as predictor:
        (record,) = predictor.predict_array(images[0], Geometry(images[0].shape[1:], (1.0, 1.0, 1.0))).etta
    assert record["field_spreads"][0] <= 1.01 * expected[0].spread  # it is one of them
    assert record["fields_removed"] == []
