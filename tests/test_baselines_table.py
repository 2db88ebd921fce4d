"""documentation/baselines.md: every row's command is run as it stands there, and no network is missing."""

import dataclasses
import json
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nnunet_models import Tiny, write_model
from small_networks import present, small_plan

from ukbob_seg.dataset.image_io import Geometry, read_labels, write_image, write_labels
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.evaluation import validate_fold
from ukbob_seg.evaluation.evaluate import ReportOptions
from ukbob_seg.networks.registry import NETWORKS, build_network
from ukbob_seg.preprocessing.network_plans import PlanningInput
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.preprocessing.requested_networks import PLANNERS
from ukbob_seg.training import state
from ukbob_seg.training.checkpoint import read_checkpoint

PAGE = Path(__file__).resolve().parents[1] / "documentation" / "baselines.md"
# Section 6 of the requirements.
PAPER = {
    "Swin-UNETR", "Swin-BOB", "nnU-Net", "UNet", "V-Net", "SegResNet", "Attention U-Net", "ResUNet++", "UNETR",
    "TransUNet", "TransBTS", "nnFormer", "MedFormer", "3D UX-Net", "MedSegDiff v1", "MedSegDiff v2",
    "TotalVibeSegmentator",
}  # fmt: skip
NAME = "Dataset004_Tiny"
SHAPE = (20, 24, 20)
STEPS = ["--epochs", "1", "--iterations-per-epoch", "1", "--validation-cases", "1", "--device", "cpu"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One system, filter or adaptation."""

    system: str
    cells: dict[str, str]

    @property
    def network(self):
        return self.cells.get("name", "").strip("`")

    @property
    def command(self):
        return self.cells["command"].strip("`")


def _rows():
    header, rows = None, []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None or set(line) <= set("|-: "):
            header = header if cells else None
        elif header is None:
            header = cells
        elif header[-1] == "command":
            assert len(cells) == len(header), line
            rows.append(Row(cells[0], dict(zip(header, cells, strict=True))))
    return rows


ROWS = _rows()
NETWORK_ROWS = [row for row in ROWS if row.network]


def _of(command):
    return [row for row in ROWS if row.command.split()[0] == command]


def test_the_table_is_complete():
    systems = [row.system for row in ROWS]
    assert len(set(systems)) == len(systems)
    assert set(systems) >= PAPER, PAPER - set(systems)
    assert set(systems) >= {"no filter", "IQR", "volume", "SOLF", "no adaptation", "TTA", "ETTA"}
    assert {row.network for row in NETWORK_ROWS} == set(NETWORKS)
    for row in NETWORK_ROWS:
        words = row.command.split()
        named = words[words.index("--network") + 1] if "--network" in words else "swin_unetr"
        assert named == row.network
        requires = NETWORKS[row.network].requires
        assert ("MONAI" in row.cells["needs"]) == ("baselines" in requires)
        assert ("nnU-Net" in row.cells["needs"]) == ("dynamic" in requires)


@pytest.mark.parametrize("row", NETWORK_ROWS, ids=lambda row: row.system)
def test_the_parameters_are_those_of_the_planned_network(row):
    _need(row.network)
    memory_gb = 1000.0 if row.network in ("swin_unetr", "plain_conv_unet") else 100.0
    planned, _ = PLANNERS[row.network](PlanningInput((96, 96, 96), (1.0, 1.0, 1.0), 1e9, 1, 3, memory_gb))
    try:
        with torch.device("meta"):
            network = build_network(row.network, 1, 3, planned.arguments)
    except RuntimeError:  # a constructor that reads values
        network = build_network(row.network, 1, 3, planned.arguments)
    counted = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert float(row.cells["parameters"]) == pytest.approx(counted, abs=0.05)


def _need(network):
    if "baselines" in NETWORKS[network].requires:
        pytest.importorskip("monai", reason="MONAI is not installed")
    if "dynamic" in NETWORKS[network].requires:
        pytest.importorskip("dynamic_network_architectures", reason="nnU-Net's networks are not installed")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Six scans of two boxes, planned and preprocessed; plans.json holds every network at a small size."""
    roots = Roots.below(tmp_path_factory.mktemp("baselines"))
    geometry = Geometry(SHAPE, (1.0, 1.2, 0.9))
    for number in range(6):
        generator = np.random.default_rng(number)
        truth = np.zeros(SHAPE, np.uint8)
        truth[4:12, 4:11, 3 : 10 + number % 3], truth[12:18, 12:20, 8:18] = 1, 2
        image = (100.0 + 60.0 * truth + generator.normal(0, 5, SHAPE)).astype(np.float32)
        part = "Tr" if number < 5 else "Ts"
        write_image(image, geometry, roots.raw / NAME / f"images{part}" / f"case_{number}_0000.nii.gz")
        write_labels(truth, geometry, roots.raw / NAME / f"labels{part}" / f"case_{number}.nii.gz")
    content = {
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "first": 1, "second": 2}, "numTraining": 5,
        "file_ending": ".nii.gz",
    }  # fmt: skip
    (roots.raw / NAME / "dataset.json").write_text(json.dumps(content))
    folder = plan_and_preprocess(4, roots, PlanOptions(memory_gb=2, batch_size=1, feature_size=12), workers=1).folder
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["networks"] = {name: small_plan(name) for name in present()}
    (folder / "plans.json").write_text(json.dumps(plans))
    return roots


@pytest.fixture
def run(prepared, monkeypatch, tmp_path):
    """Run a command of the page in this process, in a results folder of its own."""
    for key, value in {"RAW": prepared.raw, "PREPROCESSED": prepared.preprocessed, "RESULTS": tmp_path}.items():
        monkeypatch.setenv(f"UKBOB_{key}", str(value))
    # The curve and the report of so short a run take longer than its steps; other tests look at them.
    monkeypatch.setattr(state, "write_plot", lambda *given: None)
    monkeypatch.setattr(validate_fold, "ReportOptions", lambda images: ReportOptions(write=False))

    def call(command, *more, **places):
        name, *words = shlex.split(command)
        words = [str(places.get(word, word)) for word in words]
        assert import_module(f"ukbob_seg.cli.{name.removeprefix('ukbob_')}").main([*words, *more]) == 0

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the first system's model goes, for the rows that start from one."""
    return tmp_path_factory.mktemp("trained")


def _weights(folder):
    return read_checkpoint(folder / "checkpoint_final.pt")[1]["network_weights"]


@pytest.mark.parametrize("row", NETWORK_ROWS, ids=lambda row: row.system)
def test_every_network_trains_is_validated_and_adapts(row, run, prepared, trained, tmp_path, monkeypatch):
    _need(row.network)
    given = {}
    if "--pretrained" in row.command:
        source = trained / NAME / "3d_fullres__swin_unetr" / "fold_0" / "checkpoint_final.pt"
        if not source.is_file():
            pytest.skip("the row of Swin-UNETR was not run before")
        given["swin_bob.pt"] = source
    elif row.network == "swin_unetr":
        monkeypatch.setenv("UKBOB_RESULTS", str(trained))
        tmp_path = trained
    run(row.command, *STEPS, **given)
    folder = tmp_path / NAME / f"3d_fullres__{row.network}" / "fold_0"
    assert read_checkpoint(folder / "checkpoint_final.pt")[0].network == row.network
    scores = json.loads((folder / "validation" / "summary.json").read_text())
    assert scores["cases"] == 1
    assert set(scores["classes"]) == {"first", "second"}
    if given:
        record = json.loads((folder / "pretrained.json").read_text())
        assert str(record).count("checkpoint_final.pt")
    if row.network != "swin_unetr":  # of that, the rows of adaptation
        _adapts(row.network, run, prepared, tmp_path)


def _adapts(network, run, prepared, tmp_path):
    """``--network NAME`` with the page's command for ETTA; a network without parameters to adapt is refused."""
    (command,) = [row.command for row in ROWS if row.system == "ETTA"]
    places = {"images": prepared.raw / NAME / "imagesTs", "predictions": tmp_path / "predictions"}
    run(command, "--network", network, "--checkpoint", "final", "--etta-steps", "1", "--device", "cpu", **places)
    labels, geometry = read_labels(tmp_path / "predictions" / "case_5.nii.gz")
    assert geometry.shape == SHAPE
    assert set(np.unique(labels)) <= {0, 1, 2}
    record = json.loads((tmp_path / "predictions" / "case_5_etta.json").read_text())
    assert str(record).count("adapted_parameters")


@pytest.mark.parametrize("row", _of("ukbob_predict"), ids=lambda row: row.system)
def test_every_prediction_runs(row, run, prepared, trained, tmp_path, monkeypatch):
    places = {"images": prepared.raw / NAME / "imagesTs", "predictions": tmp_path / "predictions"}
    if "-m" in row.command.split():
        pytest.importorskip("dynamic_network_architectures", reason="nnU-Net's networks are not installed")
        places["totalvibe_model"] = write_model(Tiny(), tmp_path)
    elif not (trained / NAME).is_dir():
        pytest.skip("the row of Swin-UNETR was not run before")
    else:
        monkeypatch.setenv("UKBOB_RESULTS", str(trained))
    run(row.command, "--device", "cpu", **places)
    labels, geometry = read_labels(tmp_path / "predictions" / "case_5.nii.gz")
    assert geometry.shape == SHAPE
    assert set(np.unique(labels)) <= {0, 1, 2}


@pytest.mark.parametrize("row", _of("ukbob_filter"), ids=lambda row: row.system)
def test_every_filter_runs(row, run, prepared):
    run(row.command, "--min-samples", "5", "--no-report", "--workers", "1")
    flags = pd.read_parquet(prepared.preprocessed / NAME / "solf" / "flags.parquet")
    expected = {
        "none": [False] * len(flags),
        "iqr": flags["volume_mm3_outside"].tolist(),
        "volume": flags["normalized_volume_outside"].tolist(),
        "solf": (flags["votes"] >= 2).tolist(),
    }[row.command.split()[-1]]
    assert flags["flagged"].tolist() == expected
