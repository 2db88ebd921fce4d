"""Hostile and damaged archives and checkpoints: refused before anything is written or run."""

import os
import pickle
import shutil
import stat
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunet_models import Tiny, write_model

from ukbob_seg.errors import CheckpointError
from ukbob_seg.inference.predictor import Predictor
from ukbob_seg.nnunet import archive
from ukbob_seg.nnunet.archive import (
    ArchiveLimits,
    check_archive,
    share_unpacked,
    split_archive_path,
    unpack,
    unpacked_folders,
)
from ukbob_seg.nnunet.folders import find_model, is_nnunet_model
from ukbob_seg.nnunet.weights import read_nnunet_checkpoint

pytest.importorskip("dynamic_network_architectures", reason="pip install --no-deps dynamic-network-architectures")


def zipped(folder: Path, target: Path, root: Path | None = None) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(root or folder.parent.parent))
    return target


def with_entry(
    path: Path, name: str, content: bytes = b"x", mode: int = 0o644, method: int = zipfile.ZIP_STORED
) -> Path:
    """A zip with one entry, whose name is written as it is given."""
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name
    info.external_attr, info.compress_type = mode << 16, method
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(info, content)
    return path


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where archives would be unpacked; empty when nothing was."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(archive.tempfile, "tempdir", str(folder))
    monkeypatch.setattr(archive, "_UNPACKED", {})
    monkeypatch.setattr(archive, "_SHARED", {})
    yield folder
    for each in archive._UNPACKED.values():
        each.cleanup()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../outside.txt", "leads out"),
        ("a/../../outside.txt", "leads out"),
        ("/etc/outside.txt", "absolute"),
        ("C:/outside.txt", "absolute"),
        ("a\\..\\outside.txt", "backslash"),
        ("plans.json\0.txt", "NUL"),
    ],
)
def test_names_that_lead_out_are_refused(name, said, tmp_path, temporary):
    path = with_entry(tmp_path / "model.zip", name)
    with pytest.raises(CheckpointError, match=said):
        find_model(path)
    assert list(temporary.glob("ukbob_*")) == []
    assert not (tmp_path / "outside.txt").exists()


def test_links_are_refused(tmp_path, temporary):
    path = with_entry(tmp_path / "model.zip", "fold_0", b"/etc", stat.S_IFLNK | 0o777)
    with pytest.raises(CheckpointError, match="link"):
        find_model(path)
    assert list(temporary.glob("ukbob_*")) == []


def test_one_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as file:
        file.writestr("plans.json", "{}")
        file.writestr("Plans.json", "{}")
    with pytest.raises(CheckpointError, match="twice"):
        find_model(tmp_path / "model.zip")


def test_bombs_are_refused_by_ratio_size_and_number(tmp_path, temporary):
    path = with_entry(tmp_path / "model.zip", "plans.json", bytes(8 * 2**20), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="times its size"):
        find_model(path)
    path = with_entry(tmp_path / "large.zip", "plans.json", os.urandom(4096))
    with pytest.raises(CheckpointError, match="of disk"):
        check_archive(path, ArchiveLimits(total_bytes=4095))
    with pytest.raises(CheckpointError, match="1 entries, at most 0"):
        check_archive(path, ArchiveLimits(entries=0))
    assert len(check_archive(path, ArchiveLimits(total_bytes=4096, entries=1))) == 1
    assert list(temporary.glob("ukbob_*")) == []


def test_a_lying_directory_unpacks_no_more_than_it_says(tmp_path, temporary):
    """The central directory says 10 bytes, the entry holds a megabyte."""
    path = with_entry(tmp_path / "model.zip", "plans.json", bytes(2**20), method=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\x01\x02")
    content[central + 24 : central + 28] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        unpack(path, check_archive(path))
    assert sum(each.stat().st_size for each in temporary.rglob("*") if each.is_file()) <= 10


def test_what_is_no_archive(tmp_path):
    (tmp_path / "model.zip").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(CheckpointError, match="not a zip archive"):
        find_model(tmp_path / "model.zip")


def test_an_exported_model_is_unpacked_once(tmp_path, temporary):
    folder = write_model(Tiny(), tmp_path / "results")
    (folder / "fold_0" / "progress.png").write_bytes(b"png")
    path = zipped(folder, tmp_path / "export.zip", tmp_path / "results")
    assert is_nnunet_model(path)
    files = find_model(path)
    assert files.shown == f"{path}/Dataset005_Tiny/{folder.name}"
    assert files.folds("final") == ["0"]
    assert not (files.folder / "fold_0" / "progress.png").exists()  # what prediction does not need
    assert find_model(path / "Dataset005_Tiny" / folder.name) == files
    assert len(list(temporary.glob("ukbob_*"))) == 1


def test_a_model_at_the_top_of_an_archive(tmp_path):
    folder = write_model(Tiny(), tmp_path / "results")
    files = find_model(zipped(folder, tmp_path / "flat.zip", folder))
    assert files.shown == str(tmp_path / "flat.zip")
    assert (files.folder / "plans.json").is_file()


def test_of_several_models_one_must_be_named(tmp_path):
    for configuration in ("3d_fullres", "2d"):
        flat = {"spacing": (1.0, 0.8), "patch": (12, 10), "mirror": (0, 1)} if configuration == "2d" else {}
        write_model(Tiny(configuration=configuration, **flat), tmp_path / "results")
    path = zipped(tmp_path / "results", tmp_path / "two.zip", tmp_path / "results")
    with pytest.raises(CheckpointError, match=r"2 models; give one of them.*nnUNetTrainer__nnUNetPlans__2d"):
        find_model(path)
    assert find_model(path / "Dataset005_Tiny/nnUNetTrainer__nnUNetPlans__2d").folds("final") == ["0"]
    with pytest.raises(CheckpointError, match="holds no model 'nothing'"):
        find_model(path / "nothing")


def test_of_a_cascade_the_second_stage_is_meant(tmp_path):
    write_model(Tiny(configuration="3d_lowres"), tmp_path / "results")
    folder = write_model(Tiny(configuration="3d_cascade_fullres", previous="3d_lowres"), tmp_path / "results")
    files = find_model(zipped(tmp_path / "results", tmp_path / "two.zip", tmp_path / "results"))
    assert files.folder.name == folder.name
    assert files.folder.with_name("nnUNetTrainer__nnUNetPlans__3d_lowres").is_dir()


def unpacked_checkpoints(temporary: Path) -> list[str]:
    return sorted(f"{path.parents[1].name.rpartition('__')[2]}/{path.parent.name}/{path.name}"
                  for path in temporary.rglob("*.pth"))  # fmt: skip


def test_only_the_checkpoints_that_are_loaded_are_unpacked(tmp_path, temporary):
    """Of two models with two folds and two kinds of checkpoints one file, not eight."""
    folder = write_model(Tiny(folds=("0", "1")), tmp_path / "results")
    for fold in ("0", "1"):
        final = folder / f"fold_{fold}" / "checkpoint_final.pth"
        shutil.copy(final, final.with_name("checkpoint_best.pth"))
    shutil.copytree(folder, folder.with_name("nnUNetTrainer__nnUNetPlans__other"))
    path = zipped(tmp_path / "results", tmp_path / "large.zip", tmp_path / "results")
    inner = path / "Dataset005_Tiny" / folder.name
    files = find_model(inner)
    assert files.folds("best") == files.folds("final") == ["0", "1"]
    assert unpacked_checkpoints(temporary) == []
    with Predictor.from_model_folder(inner, folds=["1"]):
        assert unpacked_checkpoints(temporary) == ["3d_fullres/fold_1/checkpoint_final.pth"]
    with Predictor.from_model_folder(inner, folds=["0"], checkpoint="best"):
        assert unpacked_checkpoints(temporary) == [
            "3d_fullres/fold_0/checkpoint_best.pth", "3d_fullres/fold_1/checkpoint_final.pth",
        ]  # fmt: skip
    assert len(list(temporary.glob("ukbob_*"))) == 1


def test_of_a_cascade_both_stages_are_unpacked(tmp_path, temporary):
    write_model(Tiny(configuration="3d_lowres", folds=("0", "1")), tmp_path / "results")
    write_model(Tiny(configuration="3d_cascade_fullres", previous="3d_lowres"), tmp_path / "results")
    path = zipped(tmp_path / "results", tmp_path / "two.zip", tmp_path / "results")
    with Predictor.from_model_folder(path, previous_folds=["1"]) as predictor:
        assert predictor.origin()[1].endswith("nnUNetTrainer__nnUNetPlans__3d_lowres/fold_1/checkpoint_final.pth")
        assert [path.parent.name for path in predictor.checkpoint_files()] == ["fold_0", "fold_1"]
    assert unpacked_checkpoints(temporary) == [
        "3d_cascade_fullres/fold_0/checkpoint_final.pth", "3d_lowres/fold_1/checkpoint_final.pth",
    ]  # fmt: skip


def test_processes_share_what_the_first_unpacked(tmp_path, temporary, monkeypatch):
    folder = write_model(Tiny(), tmp_path / "results")
    path = zipped(folder, tmp_path / "export.zip", tmp_path / "results")
    files = find_model(path)
    files.checkpoint("0", "final")
    folders = unpacked_folders()
    mine = archive._UNPACKED
    monkeypatch.setattr(archive, "_UNPACKED", {})  # as in another process
    share_unpacked(folders)
    assert find_model(path) == files
    assert len(list(temporary.glob("ukbob_*"))) == 1
    for each in mine.values():
        each.cleanup()
    other = find_model(path)  # that process has ended, or is on another machine
    assert other.folder != files.folder
    assert other.checkpoint("0", "final").is_file()


def test_an_archive_of_ours_is_sent_to_the_import(tmp_path, temporary):
    path = tmp_path / "ours.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("manifest.json", '{"format": "ukbob_seg model", "format_version": 1, "members": {}}')
        file.writestr("plans.json", "{}")
    for given in (path, path / "inner"):
        with pytest.raises(CheckpointError, match=r"make a model folder of it with ukbob_import_model \S+ours\.zip"):
            find_model(given)
    assert list(temporary.glob("ukbob_*")) == []


def test_threads_do_not_take_the_allowed_kinds_from_each_other(tmp_path, monkeypatch):
    """The list is PyTorch's, one per process: the first thread to end would empty it for the second."""
    path = write_model(Tiny(), tmp_path) / "fold_0" / "checkpoint_final.pth"
    real, waits = torch.load, [0.0, 0.3]

    def slow(*arguments, **options):
        time.sleep(waits.pop(0))
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", slow)
    with ThreadPoolExecutor(2) as pool:
        read = list(pool.map(read_nnunet_checkpoint, [path, path]))
    assert [content.configuration for content in read] == ["3d_fullres"] * 2


def test_paths_into_archives(tmp_path):
    path = with_entry(tmp_path / "model.zip", "plans.json")
    assert split_archive_path(path) == (path, "")
    assert split_archive_path(path / "a" / "b") == (path, "a/b")
    assert split_archive_path(tmp_path / "missing.zip" / "a") is None
    (tmp_path / "folder.zip").mkdir()
    assert split_archive_path(tmp_path / "folder.zip" / "a") is None


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_hostile_pickle_is_refused_and_does_not_run(kind, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "fold_0" / "checkpoint_final.pth"
    path.parent.mkdir()
    content = {"network_weights": {"w": torch.ones(1)}, "init_args": Hostile(marker), "trainer_name": "nnUNetTrainer"}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content["init_args"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"posix\.system|more than weights"):
        read_nnunet_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # so the attack works on whoever unpickles


def test_a_checkpoint_that_is_a_bomb_is_refused(tmp_path):
    """PyTorch's files are zip archives, too."""
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {"w": torch.zeros(2**21)}, "init_args": {}, "trainer_name": "x"}, path)
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(CheckpointError, match="times its size"):
        read_nnunet_checkpoint(packed)


@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_numbers_and_devices_of_real_checkpoints_are_allowed(legacy, tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    numbers = [kind(1) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_)]
    content = {
        "network_weights": {"module.w": torch.ones(2), "_orig_mod.v": torch.ones(2)},
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
        "logging": {"dice": numbers},
        "_best_ema": np.float64(0.5),
        "init_args": {"configuration": "3d_fullres", "device": torch.device("cuda")},
        "trainer_name": "nnUNetTrainerNoMirroring",
        "inference_allowed_mirroring_axes": None,
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = read_nnunet_checkpoint(path)
    assert sorted(found.weights) == ["v", "w"]
    assert found.mirror_axes == ()
    assert found.configuration == "3d_fullres"


def test_numbers_pickled_by_numpy_1_are_allowed(tmp_path):
    """Their module has another name there."""
    path = tmp_path / "checkpoint_final.pth"
    content = {
        "network_weights": {"w": torch.ones(2)}, "_best_ema": np.float64(0.5),
        "init_args": {"configuration": "2d"}, "trainer_name": "nnUNetTrainer",
    }  # fmt: skip
    torch.save(content, path)
    renamed = tmp_path / "renamed.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(renamed, "w") as target:
        for entry in source.infolist():
            target.writestr(entry, source.read(entry).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in renamed.read_bytes()
    assert read_nnunet_checkpoint(renamed).configuration == "2d"


@pytest.mark.parametrize("lacking", ["network_weights", "init_args", "trainer_name"])
def test_checkpoints_of_other_programs(lacking, tmp_path):
    content = {"network_weights": {"w": torch.ones(1)}, "init_args": {"configuration": "2d"}, "trainer_name": "x"}
    del content[lacking]
    torch.save(content, tmp_path / "checkpoint_final.pth")
    with pytest.raises(CheckpointError, match=f"lacks {lacking}"):
        read_nnunet_checkpoint(tmp_path / "checkpoint_final.pth")
