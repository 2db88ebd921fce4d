"""TotalVibeSegmentator's first releases: a model whose second channel is the label map of another model."""

import json

import numpy as np
import pytest
from cohorts import GEOMETRY, label, make_cohort
from nnunet_models import Tiny, write_model

from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.inference.predictor import Predictor

pytest.importorskip("dynamic_network_architectures", reason="pip install --no-deps dynamic-network-architectures")
TWO = {"schemes": ("ZScoreNormalization", "NoNormalization"), "masked": (False, False)}


@pytest.fixture
def models(tmp_path):
    """The model and its ROI model, which turn images to other sides."""
    roi = Tiny(seed=4, extra={"orientation": ["L", "A", "S"]})
    model = Tiny(**TWO, extra={"roi": 278, "orientation": ["R", "A", "S"]})
    return write_model(model, tmp_path / "results"), write_model(roi, tmp_path / "roi")


def test_the_label_map_of_the_roi_model_is_the_last_channel(models, tmp_path):
    model, roi = models
    cohort, output = make_cohort(tmp_path / "cohort", cases=1, channels=2), tmp_path / "Dataset001_X"
    command = ["--model", model, "--roi-model", roi, "--input", cohort, "--output", output]
    assert label(*command, "--channel", "water") == 0
    image, geometry = read_image([cohort / "imagesTr" / "s0_0001.nii.gz"])
    with Predictor.from_model_folder(roi) as first, Predictor.from_model_folder(model) as second:
        regions = first.predict_array(image, geometry).labels
        expected = second.predict_array(np.stack([image[0], regions]).astype(np.float32), GEOMETRY).labels
        without = second.predict_array(np.stack([image[0], 0 * image[0]]), GEOMETRY).labels
    assert len(np.unique(regions)) > 1
    labels, _ = read_labels(output / "labelsTr" / "s0.nii.gz")
    assert np.array_equal(labels, expected)
    assert not np.array_equal(labels, without)
    record = json.loads((output / "labelling.json").read_text())
    assert record["channels"] == ["water"]
    assert record["checkpoints"] == [f"{folder}/fold_0/checkpoint_final.pth" for folder in models]
    fused = tmp_path / "Dataset002_X"
    command = ["--model", model, "--roi-model", roi, "--input", cohort, "--output", fused]
    assert label(*command, "--fuse", "water", "fat") == 2  # the structures are none of TotalVibeSegmentator's
    assert not fused.exists()


def test_what_is_needed_is_said(models, tmp_path, capsys):
    model, _ = models
    cohort, output = make_cohort(tmp_path / "cohort", cases=1, channels=2), tmp_path / "Dataset001_X"
    command = ["--model", model, "--input", cohort, "--output", output]
    assert label(*command, "--channel", "water") == 2
    said = capsys.readouterr().err
    assert "label map of TotalVibeSegmentator's ROI model 278: give that model with --roi-model" in said
    assert label(*command, "--channel", "water", "--roi-model", model) == 2
    assert "needs a ROI model itself" in capsys.readouterr().err
    two = write_model(Tiny(**TWO), tmp_path / "two")
    assert label(*command, "--channel", "water", "--roi-model", two) == 2
    assert "--roi-model takes 2 channels, expected 1" in capsys.readouterr().err
    assert not output.exists()
    assert label(*command, "--channel", "water", "fat") == 0  # a channel of the cohort stands for the map
