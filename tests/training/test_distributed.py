"""Several processes give what one gives: the same losses, weights and curves, and one sentence when it is refused."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.training import distributed
from ukbob_seg.training.augmentation import AugmentationSetup, Batch, augment, make_transforms, read_size
from ukbob_seg.training.checkpoint import read_checkpoint
from ukbob_seg.training.losses import SigmoidDiceLoss, SoftmaxDiceLoss

FOLD = Path("Dataset007_Blobs", "3d_fullres__tests_tiny.Plain", "fold_0")

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def _command(roots, results, *more, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        *launcher, "-m", "ukbob_seg.cli.train", "7", "0", "--network", "tests_tiny:Plain", "--device", "cpu",
        "--iterations-per-epoch", "1", "--validation-every", "2", "--optimizer", "sgd", "--lr", "1e-2",
        "--schedule", "constant", "--raw", str(roots.raw), "--preprocessed", str(roots.preprocessed),
        "--results", str(results), *more,
    ]  # fmt: skip
    paths = os.pathsep.join([str(roots.raw.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return command, environment


def _run(roots, results, *more, processes=1):
    command, environment = _command(roots, results, *more, processes=processes)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)


def _final(results):
    content = read_checkpoint(results / FOLD / "checkpoint_final.pt")[1]
    return content, json.loads(content["history"])


def _assert_equal(one, other):
    """Losses and validation of every step to 1e-5, weights likewise."""
    for row, same in zip(_final(one)[1], _final(other)[1], strict=True):
        assert row["train_loss"] == pytest.approx(same["train_loss"], abs=1e-5)
        assert row.get("val_mean_dice") == pytest.approx(same.get("val_mean_dice"), abs=1e-4)
    weights, expected = (_final(results)[0]["network_weights"] for results in (one, other))
    assert all(torch.allclose(weights[name], value, atol=1e-5) for name, value in expected.items())


def test_two_processes_give_the_losses_of_one(roots, tmp_path):
    recipe = ["--accumulate", "2", "--ema", "0.9"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert (done := _run(roots, one, "--epochs", "6", *recipe)).returncode == 0, done.stderr
    # The other begins as one process and goes on as two.
    assert (done := _run(roots, two, "--epochs", "2", "--no-validation", *recipe)).returncode == 0, done.stderr
    done = _run(roots, two, "--epochs", "6", "--resume", *recipe, processes=2)
    assert done.returncode == 0, done.stderr
    _assert_equal(two, one)
    assert done.stdout.count("trained -> ") == 1
    assert done.stdout.count("validation -> ") == 1
    with open(two / FOLD / "progress.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2", "3", "4", "5"]
    assert {path.name for path in (two / FOLD).iterdir()} == {path.name for path in (one / FOLD).iterdir()}
    summaries = [json.loads((r / FOLD / "validation" / "summary.json").read_text()) for r in (one, two)]
    assert summaries[0].keys() == summaries[1].keys()


def test_sigterm_stops_all_processes_after_the_same_step(roots, tmp_path):
    slow = ["--network", "tests_tiny:Slow", "--iterations-per-epoch", "40", "--epochs", "2", "--no-validation"]
    folder = tmp_path / "r" / FOLD.parent.with_name("3d_fullres__tests_tiny.Slow") / "fold_0"
    command, environment = _command(roots, tmp_path / "r", *slow, processes=2)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.time() + 100
    while not (folder / "progress.png").is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.terminate()  # torchrun passes it on
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    stopped = re.findall(
        r"stopped by SIGTERM after step (\d+) of 40 in epoch 1; run the same command with --resume", err
    )
    assert len(stopped) == 1, err
    content = read_checkpoint(folder / "checkpoint_latest.pt")[1]
    assert (content["epoch"], content["step"]) == (1, int(stopped[0]))
    # torchrun's own code says nothing: a job script looks for this file.
    assert (folder / "stopped.txt").read_text().startswith(f"stopped by SIGTERM after step {stopped[0]} of 40")
    done = _run(roots, tmp_path / "r", *slow, "--resume")
    assert done.returncode == 0, done.stderr
    assert len((folder / "progress.csv").read_text().splitlines()) == 3
    assert not (folder / "stopped.txt").exists()


def test_a_refusal_is_one_sentence_of_all_processes(roots, tmp_path):
    done = _run(roots, tmp_path / "r", "--epochs", "2", "--resume", processes=2)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
        f"error: nothing to resume in {tmp_path / 'r' / FOLD}; drop --resume to start"
    ]
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


class _Ranks:
    """Stands for one process after the other, in this one."""

    def __init__(self, monkeypatch, size):
        self.rank, self.size = 0, size
        monkeypatch.setattr(distributed, "rank", lambda: self.rank)
        monkeypatch.setattr(distributed, "world_size", lambda: self.size)


def test_every_number_of_processes_reads_the_same_batches(roots, monkeypatch):
    from ukbob_seg.training.sampling import PatchDataset, PatchSettings, TrainingCase

    folder = roots.preprocessed / "Dataset007_Blobs" / "3d_fullres"
    cases = [TrainingCase(f"blob_{number:03d}") for number in range(5)]
    settings = PatchSettings((16, 16, 16), 4, 0.5, 255, seed=3)
    whole = PatchDataset(folder, cases, settings)[11]
    parts = [PatchDataset(folder, cases, dataclasses.replace(settings, rank=r, ranks=2))[11] for r in range(2)]
    for name, values in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values)


@pytest.mark.parametrize("name", ["ukbob", "strong", "mri"])
@pytest.mark.parametrize("channels", [2, 6])  # as many as elements: what is drawn per channel is not divided
def test_each_element_is_augmented_as_in_one_process(name, channels, monkeypatch):
    transforms = make_transforms(name, AugmentationSetup((8, 8, 8), (1.0, 1.0, 1.0), channels=channels))
    size = read_size(transforms, (8, 8, 8))
    generator = torch.Generator().manual_seed(1)
    batch = Batch(
        torch.rand(6, channels, *size, generator=generator), torch.randint(0, 3, (6, *size)), torch.ones(6, *size)
    )
    for seed in range(8):
        expected = augment(batch, transforms, torch.Generator().manual_seed(seed))
        ranks = _Ranks(monkeypatch, 3)
        for ranks.rank in range(3):
            mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
            part = augment(
                Batch(batch.image[mine], batch.labels[mine], batch.previous[mine]),
                [distributed.PartOfBatch(transform) for transform in transforms],
                torch.Generator().manual_seed(seed),
            )
            assert torch.equal(part.image, expected.image[mine])
            assert torch.equal(part.labels, expected.labels[mine])
            assert torch.equal(part.previous, expected.previous[mine])


@dataclasses.dataclass(frozen=True)
class _Nested:
    each: torch.Tensor
    common: float
    inner: tuple
    listed: list


def test_a_part_of_a_record(monkeypatch):
    ranks = _Ranks(monkeypatch, 2)
    ranks.rank = 1
    inner = _Nested(torch.arange(4), 1.0, (), [])
    record = _Nested(torch.arange(4), 2.0, (inner,), ["a", "b", "c", "d"])
    part = distributed.take_part(record, 4)
    assert part.each.tolist() == part.inner[0].each.tolist() == [2, 3]
    assert part.common == 2.0
    assert part.listed == ["c", "d"]


def test_the_batch_must_be_divisible(monkeypatch):
    _Ranks(monkeypatch, 3)
    with pytest.raises(ConfigError, match=r"batch of 4 patches cannot be divided among 3 processes; start 1, 2, 4 "):
        distributed.check_batch(4)
    distributed.check_batch(6)


def test_one_process_needs_no_group():
    tensors = (torch.ones(2, requires_grad=True), torch.tensor(3))
    assert distributed.sum_over_ranks(*tensors)[0] is tensors[0]
    assert distributed.gather("x") == ["x"]
    assert distributed.my_cases([1, 2, 3]) == [1, 2, 3]
    network = torch.nn.Linear(1, 1)
    assert distributed.spread(network, "cpu", all_used=True) is network

    def refuse():
        raise DatasetError("no such case")

    with pytest.raises(DatasetError, match="no such case"):
        distributed.together(refuse)


# Organs that are flagged, element by element: in one process only; in all elements of one process; in every element.
NOWHERE, HERE, HALF, EVERYWHERE = (), ((0, 1),), ((0, 1), (1, 1), (2, 2)), ((0, 1), (1, 1), (2, 1), (3, 1), (3, 2))


@pytest.mark.parametrize("flagged", [NOWHERE, HERE, HALF, EVERYWHERE])
@pytest.mark.parametrize(
    "loss", [SoftmaxDiceLoss(255), SigmoidDiceLoss(torch.eye(3, dtype=torch.bool), 255, skip_background=True)]
)
def test_the_loss_of_two_processes_is_that_of_the_whole_batch(loss, flagged, tmp_path):
    """Different numbers of ignored voxels, classes and flags in the two halves: only global sums give the same."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 3, 4, 5, 6, generator=generator)
    labels = torch.randint(0, 3, (4, 4, 5, 6), generator=generator)
    labels[0] = 255
    labels[3, :2] = 1
    merged = torch.zeros(4, 3, dtype=torch.bool)
    for element, organ in flagged:
        merged[element, organ] = True
    whole = logits.clone().requires_grad_()
    expected = loss(whole, labels, merged if flagged else None)
    expected.backward()
    arguments = (str(tmp_path / "store"), loss, logits, labels, merged, expected.detach(), whole.grad)
    torch.multiprocessing.spawn(_half, arguments, nprocs=2)


def _half(rank, store, loss, logits, labels, merged, expected, gradient):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)
    part = logits[mine].clone().requires_grad_()
    value = loss(part, labels[mine], merged[mine] if merged[mine].any() else None)  # as FlagCodes.decode does
    value.backward()
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-6)
    # DistributedDataParallel divides by the number of processes.
    torch.testing.assert_close(part.grad / 2, gradient[mine], rtol=1e-5, atol=1e-8)
    torch.distributed.destroy_process_group()
