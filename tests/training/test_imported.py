"""Training and models that came from elsewhere: a start for fine-tuning, and nothing to resume or to lose."""

import json

import pytest

from ukbob_seg import export_model, import_model
from ukbob_seg.cli.train import main as train_command
from ukbob_seg.errors import ConfigError
from ukbob_seg.training.checkpoint import IMPORTED, read_checkpoint
from ukbob_seg.training.config import RunOptions, TrainingConfig
from ukbob_seg.training.trainer import train

NETWORK = "tests_tiny:Plain"
CONFIG = TrainingConfig(epochs=1, iterations_per_epoch=2, validation_every=1, augmentation="none")


def _train(roots, **options):
    return train(7, 0, roots, CONFIG, RunOptions(quiet=True, **options), network=NETWORK)


def test_fine_tuning_from_an_imported_model(roots, tmp_path, capsys):
    fold = _train(roots)
    card = export_model(fold.parent, tmp_path / "model.zip", quiet=True).card["models"][fold.parent.name]
    assert card["folds"]["0"]["training_cases"] == 4
    assert card["folds"]["0"]["recipe"]["iterations_per_epoch"] == 2
    imported = import_model(tmp_path / "model.zip", tmp_path / "models", quiet=True).folders[0] / "fold_0"
    line = ["7", "1", "--network", NETWORK, "--pretrained", str(imported / "checkpoint_best.pt"), "--epochs", "1",
            "--iterations-per-epoch", "1", "--no-validation", "--device", "cpu"]  # fmt: skip
    given = ["--raw", str(roots.raw), "--preprocessed", str(roots.preprocessed), "--results", str(roots.results)]
    assert train_command([*line, *given]) == 0, capsys.readouterr().err
    record = json.loads((fold.with_name("fold_1") / "pretrained.json").read_text())
    assert record["share"] == 1.0
    assert record["file"] == str(imported / "checkpoint_best.pt")


def test_an_imported_model_is_lost_only_when_told(roots, tmp_path):
    fold = _train(roots)
    before, _ = read_checkpoint(fold / "checkpoint_best.pt")
    export_model(fold.parent, tmp_path / "model.zip", quiet=True)
    import_model(tmp_path / "model.zip", roots.results, overwrite=True, quiet=True)
    assert read_checkpoint(fold / "checkpoint_best.pt")[0] == before
    for options in ({}, {"resume": True}):
        with pytest.raises(ConfigError, match="holds an imported model, which has no training state to go on with"):
            _train(roots, **options)
    assert (fold / IMPORTED).is_file()
    _train(roots, overwrite=True)
    assert not (fold / IMPORTED).exists()
    assert (fold / "checkpoint_final.pt").is_file()
