"""Labelling beyond one process: Dask workers and their devices, several processes, and what they share."""

import shutil
import tempfile
import time

import numpy as np
import pytest
import torch
from cohorts import label, make_cohort
from nnunet_models import Tiny, write_model

from ukbob_seg.cli.label import main
from ukbob_seg.dataset.image_io import read_image, read_labels
from ukbob_seg.errors import ConfigError
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.labelling import devices, labeller
from ukbob_seg.labelling import label as module
from ukbob_seg.labelling.label import label_cohort
from ukbob_seg.labelling.options import LabelOptions
from ukbob_seg.nnunet import archive
from ukbob_seg.parallel import Cluster

pytest.importorskip("dynamic_network_architectures", reason="pip install --no-deps dynamic-network-architectures")


@pytest.fixture
def scheduler():
    """A worker of four threads in this process."""
    distributed = pytest.importorskip("distributed", reason="pip install 'ukbob_seg[dask]'")
    options = {"n_workers": 1, "threads_per_worker": 4, "processes": False, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster:
        yield cluster.scheduler_address


def test_threads_of_a_dask_worker_share_one_model_and_get_the_wish_for_a_device(scheduler, tmp_path, monkeypatch):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", cases=5, channels=1)
    output, loaded, wishes = tmp_path / "Dataset001_X", [], []
    real = labeller.load_model

    def slow(options, device):
        loaded.append(device)
        time.sleep(0.3)  # the other threads ask for the model meanwhile
        return real(options, device)

    monkeypatch.setattr(labeller, "load_model", slow)
    monkeypatch.setattr(labeller, "device_of_worker", lambda wish: wishes.append(wish) or "cpu")
    arguments = ["--model", model, "--input", cohort, "--output", output, "--scheduler", scheduler]
    # There is no such device here: only the workers are asked.
    assert main([*map(str, arguments), "--device", "cuda:7"]) == 0
    assert loaded == ["cpu"]
    assert wishes == ["cuda:7"]
    assert len(list((output / "labelsTr").iterdir())) == 5
    with Predictor.from_model_folder(model) as predictor:
        for name in ("s0", "s4"):
            expected = predictor.predict_array(*read_image([cohort / "imagesTr" / f"{name}_0000.nii.gz"])).labels
            assert np.array_equal(read_labels(output / "labelsTr" / f"{name}.nii.gz")[0], expected)


def test_options_without_effect_are_refused(tmp_path, capsys):
    model, cohort = write_model(Tiny(), tmp_path / "results"), make_cohort(tmp_path / "cohort", cases=1, channels=1)
    output = tmp_path / "Dataset001_X"
    command = ["--model", model, "--input", cohort, "--output", output]
    for extra, said in (
        (["--scheduler", "tcp://nowhere:1", "--workers", "2"], "--scheduler has its own"),
        (["--scheduler", "tcp://nowhere:1", "--device", "gpu"], "--device must be auto"),
        (["--tta", "--no-mirror"], "--tta --no-mirror has no effect on a model of nnU-Net"),
        (["--roi-model", model], "--roi-model has no effect"),
    ):
        assert label(*command, *extra) == 2
        assert said in capsys.readouterr().err
    assert not output.exists()
    with pytest.raises(ConfigError, match="--workers has no effect on 2 devices"):
        LabelOptions(model, devices=("cuda:0", "cuda:1"), workers=2)
    with pytest.raises(ConfigError, match="one device for all workers, got cuda:0, cuda:1"):
        LabelOptions(model, devices=("cuda:0", "cuda:1"), cluster=Cluster("tcp://nowhere:1"))


@pytest.mark.parametrize(
    ("wish", "name", "environment", "expected"),
    [
        ("auto", 6, {}, "cuda:2"),
        ("cuda", "node1-3", {"SLURM_LOCALID": "0"}, "cuda:3"),
        ("auto", "tcp://10.0.0.1:40123", {"SLURM_LOCALID": "1"}, "cuda:1"),
        ("auto", "tcp://10.0.0.1:40123", {}, "cuda:0"),
        ("auto", 2, {"CUDA_VISIBLE_DEVICES": "2,3,0,1"}, "cuda"),
        ("auto", 2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "cuda:2"),
        ("cuda:1", 6, {}, "cuda:1"),
        ("cpu", 6, {}, "cpu"),
    ],
)
def test_each_worker_of_a_machine_takes_its_own_gpu(wish, name, environment, expected, monkeypatch):
    for variable in (*devices.RANKS, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(devices, "_name", lambda: name)
    assert devices.device_of_worker(wish) == expected


def test_a_worker_without_the_device_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.device_of_worker("auto") == "cpu"
    with pytest.raises(ConfigError, match="has 0 CUDA devices; give a device that all have"):
        devices.device_of_worker("cuda")


@pytest.mark.parametrize("choice", [{"workers": 2}, {"devices": ("cpu", "cpu:0")}])
def test_processes_use_what_the_first_unpacked_and_it_keeps_no_model(choice, tmp_path, monkeypatch):
    folder = write_model(Tiny(), tmp_path / "results")
    path = shutil.make_archive(str(tmp_path / "model"), "zip", folder.parents[1])
    cohort, output = make_cohort(tmp_path / "cohort", cases=2, channels=1), tmp_path / "Dataset001_X"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for name, value in (("_UNPACKED", {}), ("_SHARED", {})):
        monkeypatch.setattr(archive, name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    kept = []

    def as_in_other_processes(function, items, **_):
        assert labeller._MODELS == {}
        kept.append(archive._UNPACKED)
        with monkeypatch.context() as patched:
            patched.setattr(archive, "_UNPACKED", {})
            done = [function(item) for item in items]
            assert archive._UNPACKED == {}
        return done

    monkeypatch.setattr(module, "map_cases", as_in_other_processes)
    label_cohort(cohort, output, LabelOptions(tmp_path / path, quiet=True, **choice))
    assert len(list((output / "labelsTr").iterdir())) == 2
    assert len(kept) == 1
    assert len(list(temporary.glob("ukbob_model_*"))) == 1
    for each in kept[0].values():
        each.cleanup()
