"""The card says what training left, and names no case."""

import json
import zipfile

import pytest
from portable_models import CLASSES, make_model, roots_of
from shifted_models import make_dataset
from shifted_models import make_model as make_validated

from ukbob_seg import export_model, import_model
from ukbob_seg.errors import DatasetError
from ukbob_seg.evaluation.crossval import accumulate_crossval
from ukbob_seg.files import write_json
from ukbob_seg.portable.export import ExportOptions
from ukbob_seg.training.config import TrainingConfig


def _export(folder, tmp_path, **options):
    file = tmp_path / "model.zip"
    card = export_model(folder, file, options=ExportOptions(overwrite=True, **options), quiet=True).card
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("model_card.json")) == json.loads(json.dumps(card))
        return card, archive.read("README.md").decode()


def test_dice_per_class_is_that_of_all_held_out_cases(tmp_path):
    """Folds hold out different numbers of cases in general; here the oracle is the scoring of all of them together."""
    roots = make_dataset(tmp_path)
    folder = make_validated(roots, "3d_fullres", "a", {"0": 0.0, "1": 0.2})
    card, readme = _export(folder, tmp_path)
    model = card["models"][folder.name]
    expected = accumulate_crossval(folder, roots).statistics("dice")
    assert 0.5 < expected["mean"].min() < 0.95
    for name in ("low", "high"):
        assert model["dice_per_class"][name]["mean"] == pytest.approx(expected.loc[name, "mean"])
        assert model["dice_per_class"][name]["n"] == expected.loc[name, "n"] == 4
        assert f"| {name} | {expected.loc[name, 'mean']:.3f} | 4 |" in readme
    assert model["folds"]["0"]["validation"]["dice"]["low"]["mean"] == 1.0
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert not any(b"level_" in archive.read(name) for name in archive.namelist())  # what cases are called


def _validation(folder, fold, mean, n):
    classes = {"low": {"dice": {"mean": mean, "sd": 0.1, "n": n}}, "high": {"dice": {"mean": None, "sd": None, "n": 0}}}
    write_json(folder / f"fold_{fold}" / "validation" / "summary.json", {"cases": n, "classes": classes})


def test_folds_count_by_their_cases_and_fold_all_not_at_all(tmp_path):
    folder = make_model(roots_of(tmp_path), folds=("0", "1", "all"))
    for fold, mean, n in (("0", 0.9, 3), ("1", 0.5, 1), ("all", 1.0, 50)):
        _validation(folder, fold, mean, n)
    card, readme = _export(folder, tmp_path)
    dice = card["models"][folder.name]["dice_per_class"]
    assert dice["low"] == {"mean": pytest.approx(0.8), "n": 4}
    assert dice["high"] == {"mean": None, "n": 0}
    assert "| high | - | 0 |" in readme
    assert card["models"][folder.name]["folds"]["all"]["validation"]["held_out"] is False


def test_what_training_wrote(tmp_path):
    folder = make_model(roots_of(tmp_path), folds=("0",))
    run = {**TrainingConfig(epochs=7).to_json(), "cases": ["Doe_Jane", "Roe_Jim"], "ended": "all 7 epochs are done"}
    write_json(folder / "fold_0" / "training.json", run)
    write_json(folder / "fold_0" / "pretrained.json", {"file": "/home/jane/swin.pt", "share": 0.9})
    card, readme = _export(folder, tmp_path, licence="CC BY 4.0", citation="Doe et al., 2026")
    facts = card["models"][folder.name]["folds"]["0"]
    assert facts["training_cases"] == 2
    assert facts["recipe"]["epochs"] == 7
    assert "cases" not in facts["recipe"]
    assert facts["started_from"] == {"file": "swin.pt", "share": 0.9}
    assert (card["licence"], card["data"]["licence"]) == ("CC BY 4.0", "CC BY 4.0")
    assert card["citation"][0].startswith("Emmanuelle Bourigault")
    assert card["citation"][1] == "Doe et al., 2026"
    assert card["data"]["labels"] == {"low": [2], "high": [7]}
    for text in (
        "licence of the weights: CC BY 4.0",
        "Doe et al., 2026",
        "| 0 | 2 | 3 | swin.pt |",
        "ukbob_predict -d 6",
    ):
        assert text in readme
    assert "Doe_Jane" not in json.dumps(card)
    assert "not known; no fold has a validation" in readme


def test_nothing_is_claimed_that_is_not_known(tmp_path):
    stripped = {key: CLASSES[key] for key in ("channel_names", "labels", "file_ending")}
    folder = make_model(roots_of(tmp_path), stripped, folds=("0",))
    card, readme = _export(folder, tmp_path)
    facts = card["models"][folder.name]["folds"]["0"]
    assert card["licence"] is None
    assert "licence of the weights: not stated" in readme
    assert facts["training_cases"] is facts["recipe"] is facts["validation"] is facts["started_from"] is None


def test_an_imported_model_keeps_its_facts(tmp_path):
    folder = make_model(roots_of(tmp_path), folds=("0",))
    _validation(folder, "0", 0.9, 3)
    first, _ = _export(folder, tmp_path, licence="CC BY 4.0", citation="Doe et al., 2026")
    moved = import_model(tmp_path / "model.zip", tmp_path / "here", quiet=True).folders[0]
    again, _ = _export(moved, tmp_path)
    assert again == first
    assert _export(moved, tmp_path, licence="other")[0]["licence"] == "other"


def test_a_summary_of_something_else(tmp_path):
    folder = make_model(roots_of(tmp_path), folds=("0",))
    write_json(folder / "fold_0" / "validation" / "summary.json", {"classes": []})
    with pytest.raises(DatasetError, match=r"summary\.json is no summary of ukbob_evaluate"):
        _export(folder, tmp_path)
