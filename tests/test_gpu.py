"""The CUDA paths: the same code as on the CPU, checked where there is a device."""

import json
import shutil

import numpy as np
import pytest
import torch
from field_images import coil, tissues

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.paths import Roots
from ukbob_seg.inference.ensemble_predictor import load_predictor
from ukbob_seg.inference.etta_config import EttaConfig
from ukbob_seg.inference.etta_field import remove_fields
from ukbob_seg.inference.predictor import PredictionSettings, Predictor
from ukbob_seg.networks.swin_unetr import SwinUNETR
from ukbob_seg.preprocessing import resampling, resampling_torch
from ukbob_seg.preprocessing.intensity_field import UsualField
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.pipeline import plan_and_preprocess
from ukbob_seg.preprocessing.planner import PlanOptions
from ukbob_seg.preprocessing.resampling_taps import PlaneRange
from ukbob_seg.preprocessing.storage import open_array
from ukbob_seg.training.augmentation import (
    AugmentationSetup,
    Batch,
    RandomNoise,
    augment,
    make_transforms,
    read_size,
)
from ukbob_seg.training.config import TrainingConfig
from ukbob_seg.training.prefetch import to_device
from ukbob_seg.training.trainer import RunOptions, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_swin_unetr_on_the_device_equals_the_cpu():
    torch.manual_seed(0)
    network = SwinUNETR(2, 3, feature_size=12).eval()
    x = torch.randn(1, 2, 64, 32, 96)
    with torch.no_grad():
        expected = network(x)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        found = network.cuda()(x.cuda()).cpu()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


SHAPES = [((30, 41, 52), (45, 62, 78)), ((45, 62, 78), (30, 41, 52)), ((1, 40, 50), (1, 20, 25))]


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_resampled_on_the_device_equal_the_cpu(rng, old, new, axis, dtype):
    labels = rng.integers(0, 5, old).astype(dtype) * (9000 if dtype == np.uint16 else 60)
    result = resampling_torch.resample_labels(torch.from_numpy(labels).cuda(), new, axis)
    assert result.is_cuda
    assert np.array_equal(result.cpu().numpy(), resampling.resample_labels(labels, new, axis))


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("classes", [5, 300])
def test_decisions_on_the_device_equal_the_cpu(rng, old, new, axis, classes):
    logits = rng.normal(size=(classes, *old)).astype(np.float16)
    source = torch.from_numpy(logits).cuda()
    for given in (source, source.float()):
        indices = resampling_torch.logits_to_indices(given, new, axis).cpu().numpy()
        assert np.array_equal(indices, resampling.logits_to_indices(logits, new, axis))
        regions = resampling_torch.logits_to_regions(given, new, axis).cpu().numpy()
        assert np.array_equal(regions, resampling.logits_to_regions(logits, new, axis))
    planes = resampling_torch.resample_logits_planes(source, new, PlaneRange(0, 1), axis).cpu().numpy()
    assert np.array_equal(planes, resampling.resample_logits_planes(logits, new, PlaneRange(0, 1), axis))


@pytest.mark.parametrize(("old", "new"), SHAPES)
@pytest.mark.parametrize("options", [{}, {"anti_alias": True}, {"coarse_axis": 0, "coarse_order": 1}, {"order": 0}])
def test_images_resampled_on_the_device_equal_the_cpu(rng, old, new, options):
    image = rng.normal(size=(2, *old)).astype(np.float32)
    result = resampling_torch.resample_image(torch.from_numpy(image).cuda(), new, **options).cpu().numpy()
    assert np.abs(result - resampling.resample_image(image, new, **options)).max() <= 1e-5 * np.ptp(image)


def test_deciding_on_the_device_never_holds_all_classes(rng):
    logits = torch.from_numpy(rng.normal(size=(40, 40, 60, 60)).astype(np.float32)).cuda()
    new = (80, 240, 240)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    resampling_torch.logits_to_indices(logits, new)
    added = torch.cuda.max_memory_allocated() - before
    assert added < 0.25 * 4 * 40 * np.prod(new)


@pytest.mark.parametrize("name", ["ukbob", "strong", "mri"])
def test_augmentation_on_the_device_equals_the_cpu(name):
    transforms = make_transforms(name, AugmentationSetup((24, 32, 32), (2.0, 1.0, 1.0), channels=2))
    for transform in transforms:
        if isinstance(transform, RandomNoise):
            transform.probability = 0.0  # its draws are the device's own
    size = read_size(transforms, (24, 32, 32))
    image, labels = torch.randn(4, 2, *size), torch.randint(0, 9, (4, *size), dtype=torch.int32)
    for seed in range(8):
        expected = augment(Batch(image, labels), transforms, torch.Generator().manual_seed(seed))
        found = augment(Batch(image.cuda(), labels.cuda()), transforms, torch.Generator().manual_seed(seed))
        assert (found.image.cpu() - expected.image).abs().max() < 1e-3
        assert (found.labels.cpu() == expected.labels).float().mean() > 0.999


def test_noise_repeats_itself_on_the_device():
    noise, batch = (
        RandomNoise(probability=1.0),
        Batch(torch.zeros(2, 1, 8, 8, 8).cuda(), torch.zeros(2, 8, 8, 8).cuda()),
    )
    one, two = (augment(batch, [noise], torch.Generator().manual_seed(3)).image for _ in range(2))
    assert torch.equal(one, two)
    assert one.std() > 0


@pytest.mark.parametrize("network", ["swin_unetr", "plain_conv_unet"])
def test_train_predict_and_adapt(make_dataset, tmp_path, network):
    if network == "plain_conv_unet":
        pytest.importorskip("dynamic_network_architectures")
    make_dataset(cases=5, shape=(40, 40, 40))
    roots = Roots.below(tmp_path)
    plan_and_preprocess(7, roots, PlanOptions(memory_gb=3, batch_size=2, feature_size=12), workers=1)
    config = TrainingConfig(
        epochs=4, iterations_per_epoch=40, learning_rate=2e-3, schedule="one_cycle", validation_every=4
    )
    folder = train(7, 0, roots, config, RunOptions(device="cuda", quiet=True), network=network)
    rows = (folder / "progress.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[3]) > 0.5  # mean validation Dice
    image = np.random.default_rng(0).normal(100, 30, (1, 40, 44, 36)).astype(np.float32)
    geometry = Geometry((40, 44, 36), (1.0, 1.0, 1.0))
    results = {}
    for device in ("cpu", "cuda"):
        with Predictor.from_model_folder(folder.parent, device=device) as predictor:
            results[device] = predictor.predict_array(image, geometry).labels
    assert (results["cpu"] == results["cuda"]).mean() > 0.98  # half precision moves some borders
    shutil.copytree(folder.parent, tmp_path / "twin")
    with load_predictor([folder.parent, tmp_path / "twin"], device="cuda") as predictor:
        twice = predictor.predict_array(image, geometry, tmp_path / "p.b2nd").labels
    assert (twice == results["cuda"]).mean() > 0.999
    assert open_array(tmp_path / "p.b2nd").shape == (3, 40, 44, 36)
    settings = PredictionSettings(etta=EttaConfig(steps=2), tta=True)
    with Predictor.from_model_folder(folder.parent, device="cuda", settings=settings) as predictor:
        adapted = predictor.predict_array(image, geometry)
    assert adapted.etta[0]["adapted_parameters"] > 0
    assert json.dumps(adapted.etta)


def test_batches_reach_the_device_unchanged_while_others_are_used():
    loader = [{"image": torch.full((2, 4, 96, 96, 96), float(n)).pin_memory()} for n in range(6)]
    loader = [{**arrays, "labels": torch.full((2, 96, 96, 96), n).pin_memory()} for n, arrays in enumerate(loader)]
    for n, batch in enumerate(to_device(loader, "cuda")):
        for _ in range(3):  # memory of a freed batch must not be overwritten by the copy of the next
            batch.image.mul_(2)
        assert torch.equal(batch.image.cpu(), loader[n]["image"] * 8)
        assert torch.equal(batch.labels.cpu(), loader[n]["labels"])


def test_resume_on_the_device(make_dataset, tmp_path):
    make_dataset(cases=5, shape=(40, 40, 40))
    roots = Roots.below(tmp_path)
    plan_and_preprocess(7, roots, PlanOptions(memory_gb=3, batch_size=2, feature_size=12), workers=1)
    config = TrainingConfig(epochs=2, iterations_per_epoch=3, schedule="constant", validation_every=5)
    train(7, 0, roots, config, RunOptions(device="cuda", quiet=True))
    longer = TrainingConfig(epochs=3, iterations_per_epoch=3, schedule="constant", validation_every=5)
    folder = train(7, 0, roots, longer, RunOptions(device="cuda", quiet=True, resume=True))
    assert len((folder / "progress.csv").read_text().splitlines()) == 4


def test_a_field_divided_out_on_the_device_equals_the_cpu():
    shape = (40, 44, 36)
    scheme, usual = [ChannelNormalization("zscore")], [UsualField()]
    shaded = torch.from_numpy(tissues(shape) * coil(shape)).float()[None]
    limits = EttaConfig().least_field_gain, EttaConfig().least_field_spread, EttaConfig().field_margin
    expected, _, removed = remove_fields(shaded, scheme, usual, *limits)
    found, _, on_device = remove_fields(shaded.cuda(), scheme, usual, *limits)
    assert removed == on_device == (0,)
    assert found.is_cuda
    assert (found.cpu() - expected).abs().max() < 1e-4 * expected.abs().max()
