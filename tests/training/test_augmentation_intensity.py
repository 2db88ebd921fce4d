"""Noise, blur, brightness, contrast, low resolution, gamma, and faults of MR images, against other ways to get them."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from ukbob_seg.training.augmentation import (
    AugmentationSetup,
    AxesRecord,
    Batch,
    BiasFieldRecord,
    ChannelRecord,
    FourierRecord,
    NoiseRecord,
    RandomBiasField,
    RandomBlur,
    RandomBrightness,
    RandomChannelDropout,
    RandomContrast,
    RandomGamma,
    RandomGhosting,
    RandomGibbs,
    RandomIntensityShift,
    RandomLowResolution,
    RandomNoise,
    augment,
    make_transforms,
)

SIZE = (12, 17, 20)
ALL = torch.ones(2, 3, dtype=torch.bool)
SOME = torch.tensor([[True, False, True], [False, False, False]])


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch():
    generator = _generator(3)
    image = torch.randn(2, 3, *SIZE, generator=generator) * 2 - 1
    labels = torch.randint(0, 9, (2, *SIZE), generator=generator)
    return Batch(image, labels, labels + 1)


def _all(channels, probability):
    return [
        RandomNoise(probability=probability),
        RandomBlur(channels, probability=probability),
        RandomBrightness(channels, probability=probability),
        RandomContrast(channels, probability=probability),
        RandomLowResolution(channels, probability=probability),
        RandomGamma(channels, probability=probability, inverted=True),
        RandomGamma(channels, probability=probability),
        RandomBiasField(SIZE, probability=probability),
        RandomGhosting(probability=probability),
        RandomGibbs(probability=probability),
        RandomChannelDropout(channels, probability=probability),
    ]


@pytest.mark.parametrize("transform", _all(3, 0.0), ids=lambda t: type(t).__name__)
def test_probability_zero_is_the_identity(batch, transform):
    result = augment(batch, [transform], _generator())
    assert torch.equal(result.image, batch.image)


@pytest.mark.parametrize("transform", _all(3, 1.0), ids=lambda t: type(t).__name__)
def test_only_the_image_changes_and_never_the_input(batch, transform):
    before = batch.image.clone()
    one, two, other = (augment(batch, [transform], _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(batch.image, before)
    assert torch.equal(one.labels, batch.labels)
    assert torch.equal(one.previous, batch.previous)
    assert one.image.shape == batch.image.shape
    assert bool(torch.isfinite(one.image).all())
    assert torch.equal(one.image, two.image)
    assert not torch.equal(one.image, batch.image)
    assert not torch.equal(one.image, other.image)


@pytest.mark.parametrize("transform", _all(3, 0.5), ids=lambda t: type(t).__name__)
def test_a_batch_is_the_same_as_its_elements(transform):
    image = torch.randn(6, 3, *SIZE, generator=_generator())
    batch = Batch(image, torch.zeros(6, *SIZE))
    record = transform.sample(6, _generator(2))
    whole = transform.apply(batch, record)
    changed = 0
    for i in range(6):
        parts = [getattr(record, field.name)[i : i + 1] for field in dataclasses.fields(record)]
        alone = transform.apply(Batch(image[i : i + 1], batch.labels[i : i + 1]), type(record)(*parts))
        assert torch.equal(alone.image[0], whole.image[i])
        changed += not torch.equal(whole.image[i], image[i])
    assert 0 < changed < 6


def test_noise_has_its_standard_deviation():
    quiet = Batch(torch.full((2, 3, 40, 40, 40), 5.0), torch.zeros(2, 40, 40, 40))
    record = NoiseRecord(torch.tensor([0.08, 0.0]), torch.tensor([1, 2]))
    noise = RandomNoise().apply(quiet, record).image - 5
    assert noise[0].std() == pytest.approx(0.08, rel=0.01)
    assert noise[0].mean() == pytest.approx(0, abs=1e-3)
    assert abs(float(np.corrcoef(noise[0, 0].flatten(), noise[0, 1].flatten())[0, 1])) < 0.02  # channels of their own
    assert not bool(noise[1].any())
    deviation = RandomNoise().sample(4000, _generator()).deviation
    assert 0.08 < (deviation > 0).float().mean() < 0.12
    assert 0.095 < deviation.max() <= 0.1


def test_blur_equals_scipys(batch):
    sigma = torch.rand(2, 3, 3, generator=_generator()) * 0.5 + 0.5
    result = RandomBlur(3).apply(batch, AxesRecord(SOME, sigma)).image
    for index in (0, 2):
        wanted = batch.image[0, index].double().numpy()
        for axis in range(3):
            s = float(sigma[0, index, axis])
            wanted = gaussian_filter(wanted, [s if a == axis else 0 for a in range(3)], mode="nearest",
                                     radius=[int(np.ceil(3 * s)) if a == axis else 0 for a in range(3)])  # fmt: skip
        assert np.allclose(result[0, index].numpy(), wanted, atol=1e-5)
    assert torch.equal(result[0, 1], batch.image[0, 1])
    assert torch.equal(result[1], batch.image[1])


def test_blur_works_on_slices_and_short_axes():
    image = torch.randn(1, 1, 1, 2, 30)
    flat = RandomBlur(1).apply(Batch(image, torch.zeros(1, 1, 2, 30)), AxesRecord(ALL[:1, :1], torch.ones(1, 1, 3)))
    wanted = gaussian_filter(image[0, 0].numpy(), (0, 1, 1), mode="nearest", radius=(0, 3, 3))
    assert np.allclose(flat.image[0, 0].numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 0.61, 0.999, 1.0])
def test_low_resolution_equals_torchs_interpolation(batch, scale):
    record = AxesRecord(SOME, torch.full((2, 3, 3), scale))
    result = RandomLowResolution(3).apply(batch, record).image
    small = F.interpolate(batch.image[:1], size=[round(n * scale) for n in SIZE], mode="nearest-exact")
    wanted = F.interpolate(small, size=SIZE, mode="trilinear", align_corners=False)
    assert torch.allclose(result[0, [0, 2]], wanted[0, [0, 2]], atol=1e-5)
    assert torch.equal(result[0, 1], batch.image[0, 1])
    plane = RandomLowResolution(3, axes=(1, 2)).apply(batch, record).image
    sizes = [SIZE[0], *[round(n * scale) for n in SIZE[1:]]]
    wanted = F.interpolate(
        F.interpolate(batch.image[:1], size=sizes, mode="nearest-exact"), size=SIZE, mode="trilinear"
    )
    assert torch.allclose(plane[0, 0], wanted[0, 0], atol=1e-5)


def test_brightness_multiplies_channels(batch):
    value = torch.tensor([[0.8, 1.1, 1.2], [1.0, 1.0, 1.0]])
    result = RandomBrightness(3).apply(batch, ChannelRecord(SOME, value)).image
    assert torch.allclose(result[0, 2], batch.image[0, 2] * 1.2)
    assert torch.equal(result[0, 1], batch.image[0, 1])


def test_factors_lie_on_each_side_of_one_equally_often():
    record = RandomGamma(2, (0.7, 1.5), 0.3).sample(5000, _generator())
    assert torch.equal(record.chosen[:, 0], record.chosen[:, 1])
    assert 0.28 < record.chosen.float().mean() < 0.32
    assert 0.48 < (record.value < 1).float().mean() < 0.52
    assert record.value[record.value < 1].mean() == pytest.approx(0.85, abs=0.01)
    assert record.value[record.value > 1].mean() == pytest.approx(1.25, abs=0.01)
    assert not torch.equal(record.value[:, 0], record.value[:, 1])


def test_contrast_stretches_about_the_mean_within_the_range(batch):
    for factor in (0.75, 1.25):
        result = RandomContrast(3).apply(batch, ChannelRecord(SOME, torch.full((2, 3), factor))).image
        x = batch.image[0, 0].double().numpy()
        wanted = np.clip((x - x.mean()) * factor + x.mean(), x.min(), x.max())
        assert np.allclose(result[0, 0].numpy(), wanted, atol=1e-5)
        assert torch.equal(result[1], batch.image[1])
    assert result[0, 0].std() > batch.image[0, 0].std()


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_keeps_mean_and_deviation_and_the_order_of_intensities(batch, inverted):
    transform = RandomGamma(3, inverted=inverted)
    result = transform.apply(batch, ChannelRecord(SOME, torch.full((2, 3), 1.5))).image
    before, after = batch.image[0, 0].double().flatten().numpy(), result[0, 0].double().flatten().numpy()
    assert after.mean() == pytest.approx(before.mean(), abs=1e-4)
    assert after.std() == pytest.approx(before.std(), rel=1e-4)
    sign = -1 if inverted else 1
    share = (sign * before - (sign * before).min()) / np.ptp(before)
    bent = sign * share**1.5
    wanted = (bent - bent.mean()) / bent.std() * before.std() + before.mean()
    assert np.allclose(after, wanted, atol=1e-4)
    assert (np.diff(after[np.argsort(before)]) >= 0).all()


def test_gamma_leaves_a_constant_channel():
    flat = Batch(torch.full((1, 1, 8, 8, 8), 2.5), torch.zeros(1, 8, 8, 8))
    for inverted in (False, True):
        result = RandomGamma(1, inverted=inverted).apply(flat, ChannelRecord(ALL[:1, :1], torch.full((1, 1), 0.7)))
        assert torch.allclose(result.image, flat.image)


def test_a_bias_field_is_smooth_and_multiplies_signal(batch):
    transform = RandomBiasField(SIZE, 0.4, 1.0)
    flat = Batch(torch.full((2, 2, *SIZE), 3.0), batch.labels)
    flat.image[:, :, 0, 0, 0] = 1.0  # air
    field = transform.apply(flat, transform.sample(2, _generator())).image
    factor = (field - 1) / 2
    factor[:, :, 0, 0, 0] = 1
    assert torch.allclose(factor[:, 0], factor[:, 1])
    assert float(factor.min()) > np.exp(-0.4)
    assert float(factor.max()) < np.exp(0.4)
    assert float(factor[:, 0].flatten(1).std(dim=1).min()) > 0.02
    assert float(factor[:, 0].diff(dim=-1)[..., 1:].abs().max()) < 0.12
    even = BiasFieldRecord(torch.tensor([True, False]), torch.full((2, 5, 5, 5), np.log(1.3)))
    result = RandomBiasField(SIZE).apply(batch, even).image
    lowest = batch.image[0, 0].min()
    assert torch.allclose(result[0, 0], (batch.image[0, 0] - lowest) * 1.3 + lowest, atol=1e-5)
    assert torch.equal(result[1], batch.image[1])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gibbs_ringing_is_a_truncated_fourier_transform(batch, axis):
    record = FourierRecord(torch.tensor([True, False]), torch.tensor([axis, 0]), torch.full((2,), 0.5), torch.ones(2))
    result = RandomGibbs().apply(batch, record).image
    x = batch.image[0, 1].double().numpy()
    mirrored = np.concatenate([x, np.flip(x, axis)], axis=axis)
    lines = np.abs(np.fft.fftfreq(2 * SIZE[axis], 1 / (2 * SIZE[axis])))
    kept = np.expand_dims(lines <= 0.5 * (SIZE[axis] - 1), [a for a in range(3) if a != axis])
    wanted = np.fft.ifft(np.fft.fft(mirrored, axis=axis) * kept, axis=axis).real
    assert np.allclose(result[0, 1].numpy(), np.take(wanted, range(SIZE[axis]), axis), atol=1e-5)
    assert torch.equal(result[1], batch.image[1])


def test_gibbs_ringing_overshoots_at_edges_and_not_at_the_ends():
    step = torch.zeros(1, 1, 2, 2, 64)
    step[..., 32:] = 1
    record = FourierRecord(torch.tensor([True]), torch.tensor([2]), torch.tensor([0.5]), torch.ones(1))
    line = RandomGibbs().apply(Batch(step, step[0]), record).image[0, 0, 0, 0]
    assert 1.04 < line.max() < 1.15
    assert line[:4].abs().max() < 0.03
    assert (line[-4:] - 1).abs().max() < 0.03


@pytest.mark.parametrize(("axis", "ghosts"), [(0, 2), (1, 3), (2, 4)])
def test_ghosts_are_modulated_lines_of_k_space(batch, axis, ghosts):
    record = FourierRecord(
        torch.tensor([True, False]), torch.tensor([axis, 0]), torch.full((2,), 0.3), torch.tensor([ghosts, 2])
    )
    result = RandomGhosting().apply(batch, record).image
    x = batch.image[0, 2].double().numpy()
    lines = np.abs(np.round(np.fft.fftfreq(SIZE[axis], 1 / SIZE[axis]))).astype(int)
    gain = np.where((lines % ghosts == 0) & (lines > 0), 0.7, 1.0)
    k_space = np.fft.fft(x - x.min(), axis=axis) * np.expand_dims(gain, [a for a in range(3) if a != axis])
    wanted = np.abs(np.fft.ifft(k_space, axis=axis)) + x.min()
    assert np.allclose(result[0, 2].numpy(), wanted, atol=1e-4)
    assert torch.equal(result[1], batch.image[1])


def test_ghosts_repeat_the_object():
    line = torch.zeros(1, 1, 1, 1, 60)
    line[..., 10:14] = 1
    record = FourierRecord(torch.tensor([True]), torch.tensor([2]), torch.tensor([0.3]), torch.tensor([3]))
    ghosts = RandomGhosting().apply(Batch(line, line[0]), record).image[0, 0, 0, 0]
    inside = torch.zeros(60, dtype=torch.bool)
    inside[30:34] = inside[50:54] = True  # a third of the field further on, and again
    assert ghosts[inside].min() > 0.05
    assert ghosts[~inside & (line.flatten() == 0)].max() < 0.05


def test_dropout_never_takes_the_only_channel(batch):
    dropped = RandomChannelDropout(3, 0.5).sample(2000, _generator()).dropped
    assert dropped.sum(dim=1).max() == 1
    assert 0.45 < dropped.any(dim=1).float().mean() < 0.55
    assert (dropped.float().mean(dim=0) > 0.13).all()
    assert not bool(RandomChannelDropout(1, 1.0).sample(100, _generator()).dropped.any())
    result = augment(batch, [RandomChannelDropout(3, 1.0)], _generator()).image
    assert ((result == 0).flatten(2).all(dim=2).sum(dim=1) == 1).all()


def test_fourier_faults_need_an_axis():
    for transform in (RandomGibbs((), probability=1.0), RandomGhosting((), probability=1.0)):
        assert not bool(transform.sample(50, _generator()).chosen.any())
    flat = make_transforms("mri", AugmentationSetup((1, 32, 32), (1, 1, 1)))
    assert [t.axes for t in flat if isinstance(t, (RandomGibbs, RandomGhosting))] == [(1, 2), (1, 2)]


@pytest.mark.parametrize("name", ["ukbob", "strong", "mri"])
@pytest.mark.parametrize("patch", [(12, 16, 16), (1, 16, 24), (4, 20, 20)])
def test_sets_work_on_cubes_slices_and_flat_patches(name, patch):
    swap = torch.tensor([0, 2, 1, 3, 4])
    setup = AugmentationSetup(patch, (2.0, 1.0, 1.0), (1, 2), 2, swap, channels=3)
    transforms = make_transforms(name, setup)
    image = torch.randn(4, 3, *patch, generator=_generator())
    labels = torch.randint(0, 5, (4, *patch), generator=_generator(), dtype=torch.int32)
    for seed in range(6):
        one, two = (augment(Batch(image, labels, labels), transforms, _generator(seed)) for _ in range(2))
        assert one.image.shape == image.shape
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.labels, two.labels)
        assert torch.equal(one.labels, one.previous)
        assert bool(torch.isfinite(one.image).all())
        assert set(one.labels.unique().tolist()) <= set(range(5))


def test_the_strong_set_is_nnunets():
    transforms = make_transforms("strong", AugmentationSetup((32, 32, 32), (1, 1, 1), channels=2))
    found = [(type(t).__name__[6:], getattr(t, "probability", None)) for t in transforms]
    assert found == [
        ("Spatial", None), ("Noise", 0.1), ("Blur", 0.2), ("Brightness", 0.15), ("Contrast", 0.15),
        ("LowResolution", 0.25), ("Gamma", 0.1), ("Gamma", 0.3), ("Flip", 0.5),
    ]  # fmt: skip
    spatial, noise, blur, brightness, contrast, low, inverse, gamma, _ = transforms
    assert (spatial.settings.p_rotation, spatial.settings.p_scale, spatial.settings.scale) == (0.2, 0.2, (0.7, 1.4))
    assert (spatial.settings.p_elastic, spatial.settings.p_shear, spatial.settings.p_isotropic) == (0, 0, 1)
    assert (noise.deviation, blur.sigma_vox, blur.channel_probability) == ((0, 0.1), (0.5, 1), 0.5)
    assert brightness.factor == contrast.factor == (0.75, 1.25)
    assert (low.scale, low.channel_probability) == ((0.5, 1), 0.5)
    assert (inverse.inverted, gamma.inverted, inverse.power, gamma.power) == (True, False, (0.7, 1.5), (0.7, 1.5))


@pytest.mark.parametrize("name", ["ukbob", "strong", "mri"])
@pytest.mark.parametrize("elements", [1, 2])
def test_an_image_is_overwritten_only_where_it_may_be(name, elements, batch):
    """The same numbers either way, and no other change to what was given."""
    batch = Batch(batch.image[:elements], batch.labels[:elements], batch.previous[:elements])
    transforms = make_transforms(name, AugmentationSetup(SIZE, (1.0, 1.0, 1.0), channels=3))
    for transform in transforms:
        transform.probability = 1.0  # those of RandomSpatial are in its settings
    for seed in range(4):
        before = [t.clone() for t in (batch.image, batch.labels, batch.previous)]
        expected = augment(batch, transforms, _generator(seed))
        assert all(torch.equal(a, b) for a, b in zip(before, (batch.image, *batch.label_maps()), strict=True))
        owned = dataclasses.replace(batch, image=batch.image.clone(), owned=True)
        found = augment(owned, transforms, _generator(seed))
        assert expected.owned
        assert torch.equal(found.image, expected.image)
        assert all(torch.equal(a, b) for a, b in zip(before[1:], batch.label_maps(), strict=True))


def test_what_may_be_overwritten_is(batch):
    owned = dataclasses.replace(batch, owned=True)
    shifted = augment(owned, [RandomIntensityShift(probability=1.0)], _generator())
    assert shifted.image.data_ptr() == batch.image.data_ptr()
    assert augment(batch, [RandomIntensityShift(probability=0.0)], _generator()) is batch
