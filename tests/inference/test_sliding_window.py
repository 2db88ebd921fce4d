"""Sliding window: stitching is exact, slabs cover every row once, MONAI agrees."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ukbob_seg.inference.passes import AveragedPasses, Mirroring
from ukbob_seg.inference.sliding_window import (
    Accumulation,
    EmptySpace,
    WindowSettings,
    choose_accumulation,
    gaussian_weights,
    iterate_slabs,
    predict_logits,
    segment,
    window_starts,
)


@given(
    shape=st.tuples(*[st.integers(3, 23)] * 3),
    patch=st.tuples(*[st.integers(2, 9)] * 3),
    step=st.sampled_from([0.3, 0.5, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_stitching_a_voxelwise_network_is_exact(shape, patch, step):
    """A network that sees only single voxels must give the same result in windows as on the whole image."""
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def network(windows):
        return torch.stack([windows[:, 0] * 2 + windows[:, 1], windows[:, 0] ** 2, windows[:, 1] - 3], dim=1)

    result = predict_logits(network, image, WindowSettings(patch, step, batch_size=3))
    assert torch.allclose(result, network(image[None])[0], atol=1e-4)
    decided = segment(network, image, WindowSettings(patch, step), lambda logits: logits.argmax(0))
    ties = result.topk(2, dim=0).values.diff(dim=0).abs()[0] < 1e-3
    assert torch.equal(decided.long()[~ties], result.argmax(0)[~ties])


@given(n=st.integers(1, 60), p=st.integers(1, 20), step=st.floats(0.1, 1.0))
@settings(max_examples=100, deadline=None)
def test_windows_cover_everything(n, p, step):
    n = max(n, p)
    (starts,) = window_starts((n,), (p,), step)
    assert starts[0] == 0
    assert starts[-1] == n - p
    assert all(0 <= b - a <= max(1, p * step + 1) for a, b in pairwise(starts))


def test_slabs_cover_rows_once():
    image = torch.randn(1, 30, 8, 8)
    slabs = list(iterate_slabs(lambda w: w, image, WindowSettings((8, 8, 8))))
    edges = [(slab.z_start, slab.z_stop) for slab in slabs]
    assert edges[0][0] == 0
    assert edges[-1][1] == 30
    assert all(a[1] == b[0] for a, b in pairwise(edges))
    assert len(slabs) > 3


def test_gaussian_weights():
    weights = gaussian_weights((8, 6, 5))
    assert weights.shape == (8, 6, 5)
    assert 0.5 < weights.max() <= 1
    assert weights.min() > 0
    for axis in range(3):
        assert torch.allclose(weights, weights.flip(axis))
    middle = weights[4, 3, :]
    assert torch.allclose(middle[3] / middle[2], torch.exp(torch.tensor(-0.5 / (5 / 8) ** 2)))


def test_agrees_with_monai():
    inferers = pytest.importorskip("monai.inferers")
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 3, 5, padding=2).eval()
    image = torch.randn(1, 24, 20, 16)
    # These edges make evenly spread windows and MONAI's fixed stride meet on the same positions.
    patch = (8, 8, 8)
    ours = predict_logits(AveragedPasses([network]), image, WindowSettings(patch))
    with torch.no_grad():
        theirs = inferers.sliding_window_inference(
            image[None], patch, 1, network, overlap=0.5, mode="gaussian", sigma_scale=0.125
        )[0]
    assert torch.allclose(ours, theirs, atol=1e-4)


def _three_classes(windows):
    return torch.stack([windows[:, 0] * 2 + windows[:, 1], windows[:, 0] ** 2, windows[:, 1] - 3], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_in_empty_space_are_left_out(batch_size):
    """The network is called for occupied windows only, and voxels that no window reaches get the given logits."""
    image = torch.randn(2, 20, 24, 18)
    occupied = torch.zeros(20, 24, 18, dtype=torch.bool)
    occupied[3, 2, 4] = occupied[16:18, 20, 15] = True
    seen, settings = [], WindowSettings((8, 8, 8), batch_size=batch_size)

    def network(windows):
        seen.extend(windows)
        return _three_classes(windows)

    given = torch.tensor([5.0, -1.0, -2.0])
    progress = []
    slabs = iterate_slabs(
        network, image, settings, lambda *counts: progress.append(counts), empty=EmptySpace(occupied, given)
    )
    found = torch.cat([slab.logits for slab in slabs], dim=1)
    reached = torch.zeros(20, 24, 18, dtype=torch.bool)
    starts = settings.starts(image.shape[1:])
    windows = [(z, y, x) for z in starts[0] for y in starts[1] for x in starts[2]]
    kept = [(z, y, x) for z, y, x in windows if occupied[z : z + 8, y : y + 8, x : x + 8].any()]
    for z, y, x in kept:
        reached[z : z + 8, y : y + 8, x : x + 8] = True
    assert 0 < len(kept) == len(seen) < len(windows)
    assert progress[-1] == (len(kept), len(kept))
    expected = torch.where(reached, _three_classes(image[None])[0], given.view(3, 1, 1, 1))
    assert torch.allclose(found, expected, atol=1e-4)
    nothing = EmptySpace(torch.zeros_like(occupied), given)
    slabs = list(iterate_slabs(lambda w: pytest.fail("no window is occupied"), image, settings, empty=nothing))
    assert torch.equal(torch.cat([s.logits for s in slabs], dim=1), given.view(3, 1, 1, 1).expand(3, *image.shape[1:]))
    small = iterate_slabs(network, image[:, :5, :6], settings, empty=EmptySpace(occupied[:5, :6], given))  # padded
    assert sum(slab.z_stop - slab.z_start for slab in small) == 5


def test_sums_in_half_precision_are_the_same_to_its_rounding():
    image = torch.randn(2, 20, 12, 10)
    whole = _three_classes(image[None])[0]
    half = Accumulation(torch.device("cpu"), torch.float16)
    slabs = list(iterate_slabs(_three_classes, image, WindowSettings((8, 8, 8)), accumulation=half))
    assert all(slab.logits.dtype == torch.float32 for slab in slabs)
    found = torch.cat([slab.logits for slab in slabs], dim=1)
    assert torch.allclose(found, whole, atol=4e-3 * whole.abs().max())


def test_where_sums_are_held():
    """In half precision on the device when they fit with what goes with them; else on the host."""
    image, settings = torch.empty(4, 501, 160, 224), WindowSettings((96, 96, 96))
    here = choose_accumulation(73, image, settings)  # a CPU is not asked
    assert here == Accumulation(None, torch.float32)
    assert here.reason == "the sums of 73 classes take 1.1 GB of memory"  # 4 bytes x 73 x 112 x 160 x 224
    plenty = choose_accumulation(73, image, settings, lambda: 80 * 2**30)
    assert plenty == Accumulation(None, torch.float16)
    assert plenty.reason == "the sums of 73 classes need 1.2 GB on cpu, 80.0 GB are free: they are held there"
    little = choose_accumulation(73, image, settings, lambda: 2**28)
    assert little == Accumulation(torch.device("cpu"), torch.float32)
    assert "need 1.2 GB on cpu, 256 MB are free: they are held in main memory" in little.reason


def test_progress_counts_all_windows():
    seen = []
    image = torch.zeros(1, 16, 8, 12)
    predict_logits(lambda w: w, image, WindowSettings((8, 8, 8)), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_flips_average_to_the_plain_prediction_for_an_equivariant_network():
    class Scale(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x, -x], dim=1)

    windows = torch.randn(2, 1, 4, 5, 6)
    plain = AveragedPasses([Scale()])(windows)
    flipped = AveragedPasses([Scale()], Mirroring((0, 1, 2)))(windows)
    assert torch.allclose(plain, flipped, atol=1e-6)


def test_a_left_right_flip_exchanges_left_and_right_outputs():
    """A perfect network of left/right classes must be averaged with itself, not with its mirror image."""

    class SideNetwork(torch.nn.Module):
        def forward(self, x):
            side = torch.linspace(-1, 1, x.shape[-1]).expand_as(x[:, :1])
            return torch.cat([torch.zeros_like(side), side, -side], dim=1)

    windows = torch.randn(1, 1, 4, 4, 8)
    plain = AveragedPasses([SideNetwork()])(windows)
    mirrored = AveragedPasses([SideNetwork()], Mirroring((2,), left_right_axis=2, output_swap=(0, 2, 1)))(windows)
    assert torch.allclose(plain, mirrored, atol=1e-6)
    wrong = AveragedPasses([SideNetwork()], Mirroring((2,)))(windows)
    assert not torch.allclose(plain, wrong, atol=1e-2)


def test_intensities_change_in_image_channels_only():
    class PassOn(torch.nn.Module):
        def forward(self, x):
            return x.clone()

    windows = torch.randn(2, 3, 4, 5, 6)
    before = windows.clone()
    found = AveragedPasses([PassOn()], intensities=[(2.0, 0.0), (1.0, 0.5)], image_channels=2)(windows)
    assert torch.equal(windows, before)
    torch.testing.assert_close(found[:, :2], (windows[:, :2] * 4 + 0.5) / 3)
    torch.testing.assert_close(found[:, 2], windows[:, 2])  # a first stage's labels


def test_folds_are_averaged():
    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.full_like(x, self.value)

    result = AveragedPasses([Constant(1.0), Constant(4.0)])(torch.zeros(1, 1, 2, 2, 2))
    assert torch.allclose(result, torch.tensor(2.5))
