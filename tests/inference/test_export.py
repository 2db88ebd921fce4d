"""Decisions and probabilities from rows that come one after the other, against those from the whole volume."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError, UkbobError
from ukbob_seg.inference.export import (
    PROBABILITY,
    ProbabilityStream,
    RowStream,
    WrittenClasses,
    box_shape,
    decide_resampled,
    probability_planes,
    to_file_values,
)
from ukbob_seg.inference.passes import AveragedPasses, Mirroring
from ukbob_seg.inference.sliding_window import Slab, WindowSettings, gaussian_weights, iterate_slabs
from ukbob_seg.preprocessing import resampling
from ukbob_seg.preprocessing.preprocessor import CaseProperties
from ukbob_seg.preprocessing.storage import open_array, plane_writer


def _properties(rows, box, margin=(0, 0, 0), coarse_axis=None):
    shape = tuple(n + 2 * m for n, m in zip(box, margin, strict=True))
    stop = tuple(n + m for n, m in zip(box, margin, strict=True))
    return CaseProperties(Geometry(shape, (1.0, 1.0, 1.0)), margin, stop, rows, coarse_axis)


def _slabs(logits, cuts):
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < logits.shape[1]}), logits.shape[1]]
    return [Slab(a, b, logits[:, a:b]) for a, b in itertools.pairwise(edges)]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40), planes=st.integers(1, 60), cuts=st.lists(st.integers(1, 39), max_size=8),
    coarse_axis=st.sampled_from([None, 0, 1]), regions=st.booleans(),
)  # fmt: skip
def test_streamed_decisions_are_those_of_the_whole_volume(rows, planes, cuts, coarse_axis, regions):
    logits = torch.randn(3, rows, 5, 4, generator=torch.Generator().manual_seed(rows))
    properties = _properties((rows, 5, 4), (planes, 7, 3), coarse_axis=coarse_axis)
    stream, decided = RowStream(properties), []
    for slab in _slabs(logits, cuts):
        held, wanted = stream.push(slab)
        assert wanted.start == sum(map(len, decided))
        assert held.shape[1] <= slab.logits.shape[1] + 1  # one old row at most
        decided.append(decide_resampled(held, properties, regions, wanted))
    whole = resampling.logits_to_regions if regions else resampling.logits_to_indices
    assert np.array_equal(np.concatenate(decided), whole(logits.numpy(), (planes, 7, 3), coarse_axis))


@pytest.mark.parametrize(("head", "exclusive"), [("softmax", True), ("sigmoid", False)])
def test_streamed_probabilities_are_those_of_the_whole_volume(tmp_path, head, exclusive):
    logits = torch.randn(3, 30, 6, 5, generator=torch.Generator().manual_seed(0))
    properties = _properties((30, 6, 5), (41, 9, 4), margin=(19, 2, 1))
    with plane_writer(tmp_path / "p.b2nd", (3, *properties.geometry.shape), PROBABILITY) as writer:
        stream, rows = ProbabilityStream(writer, properties, exclusive), RowStream(properties)
        for slab in _slabs(logits, [1, 7, 8, 22]):
            held, wanted = rows.push(slab)
            for values in probability_planes(held, properties, head, wanted):
                assert values.shape[1] <= 8
                stream.append(values)
    expected = np.zeros((3, *properties.geometry.shape), PROBABILITY)
    expected[0] = float(exclusive)
    everything = resampling.resample_logits_planes(logits.numpy(), (41, 9, 4), resampling.PlaneRange(0, 41))
    values = torch.from_numpy(everything)
    values = values.softmax(0) if head == "softmax" else values.sigmoid()
    expected[(slice(None), *properties.box)] = values.half().numpy()
    assert np.array_equal(open_array(tmp_path / "p.b2nd")[:], expected)


def test_rows_behind_the_last_plane_add_nothing(tmp_path):
    """A coarse file's last plane is finished before the network's last rows have come."""
    logits = torch.randn(2, 40, 3, 4, generator=torch.Generator().manual_seed(0))
    properties = _properties((40, 3, 4), (2, 3, 4), margin=(3, 0, 0), coarse_axis=0)
    with plane_writer(tmp_path / "p.b2nd", (2, *properties.geometry.shape), PROBABILITY) as writer:
        stream, rows = ProbabilityStream(writer, properties, exclusive=True), RowStream(properties)
        for slab in _slabs(logits, [16, 32, 36]):
            held, wanted = rows.push(slab)
            for values in probability_planes(held, properties, "softmax", wanted):
                stream.append(values)
    stored = open_array(tmp_path / "p.b2nd")[:]
    assert np.array_equal(stored[:, 3:5], logits[:, [10, 30]].softmax(0).half().numpy())
    assert (stored[0, [0, 1, 2, 5, 6, 7]] == 1).all()


def test_an_interrupted_stream_leaves_no_file(tmp_path):
    with (
        pytest.raises(ValueError, match="1 of 3 planes were written"),
        plane_writer(tmp_path / "p.b2nd", (1, 3, 4, 4), PROBABILITY) as writer,
    ):
        writer.append(np.zeros((1, 1, 4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_network_is_not_taken_for_one_of_the_disk(tmp_path):
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        plane_writer(tmp_path / "p.b2nd", (1, 3, 4, 4), PROBABILITY),
    ):
        raise RuntimeError("out of memory")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_while_planes_come(tmp_path, monkeypatch):
    def full(self, key, value):
        raise RuntimeError("blosc2 failed")

    monkeypatch.setattr("blosc2.NDArray.__setitem__", full)
    with (
        pytest.raises(UkbobError, match=r"cannot write .*p.b2nd: .*disk is full"),
        plane_writer(tmp_path / "p.b2nd", (1, 3, 4, 4), PROBABILITY) as writer,
    ):
        writer.append(np.zeros((1, 3, 4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_not_at_hand_are_an_error():
    logits = np.zeros((2, 3, 4, 5), np.float32)
    with pytest.raises(ValueError, match="planes 0 to 4 need rows 0 to 2, at hand are 4 to 6"):
        resampling.logits_to_indices(logits, (16, 4, 5), planes=resampling.PlaneRange(0, 4, first_row=4, rows=10))


class Layers(nn.Sequential):
    """Some random network that sees its neighbourhood."""

    def __init__(self, seed):
        super().__init__(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 5, 3, padding=1))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)


def _whole_volume(passes, image, windows):
    """Sums and weights of all windows at full size, without anything clever; zeros around a small image."""
    patch = windows.patch_size
    before = [max(0, p - n) // 2 for p, n in zip(patch, image.shape[1:], strict=True)]
    full = [max(p, n) for p, n in zip(patch, image.shape[1:], strict=True)]
    inner = (slice(None), *(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True)))
    padded = torch.zeros(len(image), *full)
    padded[inner] = image
    gauss = gaussian_weights(patch)
    sums, weights = torch.zeros(5, *full), torch.zeros(full)
    for corner in itertools.product(*windows.starts(full)):
        box = tuple(slice(start, start + p) for start, p in zip(corner, patch, strict=True))
        sums[(slice(None), *box)] += passes(padded[(slice(None), *box)][None])[0] * gauss
        weights[box] += gauss
    return (sums / weights)[inner]


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize(
    ("shape", "box", "coarse_axis"),
    [((40, 23, 19), (61, 30, 25), None), ((37, 20, 20), (12, 33, 33), 0), ((7, 16, 20), (7, 16, 20), None)],
    ids=["finer", "anisotropic", "padded"],
)
def test_a_case_in_slabs_equals_a_case_as_a_whole(shape, box, coarse_axis, regions):
    """Two folds, flips, half overlapping windows."""
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    passes = AveragedPasses([Layers(0), Layers(1)], Mirroring(axes=(0, 2)))
    windows = WindowSettings((16, 16, 16), batch_size=2)
    properties = _properties(shape, box, coarse_axis=coarse_axis)
    stream, decided = RowStream(properties), []
    for slab in iterate_slabs(passes, image, windows):
        held, wanted = stream.push(slab)
        decided.append(decide_resampled(held, properties, regions, wanted))
    found = np.concatenate(decided)
    assert found.shape == box_shape(properties)
    whole = _whole_volume(passes, image, windows)
    assert np.array_equal(found, decide_resampled(whole, properties, regions))
    assert len(np.unique(found)) > 2


REGIONS = LabelScheme.from_json({"background": 0, "whole": [2, 4, 9], "core": [4, 9], "active": [9]}, [2, 4, 9])
CLASSES = LabelScheme.from_json({"background": 0, "spleen": 300, "liver": 7}, None)


@pytest.mark.parametrize("names", [n for k in (1, 2, 3) for n in itertools.combinations(REGIONS.names, k)])
def test_a_kept_region_is_written_where_it_is_the_last_positive_of_the_kept(names):
    logits = torch.randn(3, 9, 7, 5, generator=torch.Generator().manual_seed(1))
    properties = _properties((9, 7, 5), (14, 7, 9), margin=(1, 2, 0), coarse_axis=0)
    written = WrittenClasses.of(REGIONS, names[::-1])  # in whatever order they are asked for
    decision = decide_resampled(written.deciding(logits), properties, True)
    found = to_file_values(decision, properties, written.decision_values)
    expected = np.zeros(properties.geometry.shape, np.uint8)
    planes = resampling.resample_logits_planes(logits.numpy(), (14, 7, 9), resampling.PlaneRange(0, 14), 0)
    for name, value, positive in zip(REGIONS.names, (2, 4, 9), planes > 0, strict=True):
        if name in names:
            expected[properties.box][positive] = value
    assert np.array_equal(found, expected)
    assert written.names == names


def test_a_class_that_is_left_out_becomes_background():
    logits = torch.randn(3, 9, 7, 5, generator=torch.Generator().manual_seed(1))
    properties = _properties((9, 7, 5), (14, 7, 9), margin=(1, 2, 0))
    everything = to_file_values(decide_resampled(logits, properties, False), properties, CLASSES.output_values)
    for name, value in (("spleen", 300), ("liver", 7)):
        written = WrittenClasses.of(CLASSES, [name])
        decision = decide_resampled(written.deciding(logits), properties, False)
        found = to_file_values(decision, properties, written.decision_values)
        assert np.array_equal(found, np.where(everything == value, value, 0))
        assert found.any()
        assert (written.names, written.values) == ((name,), (value,))


def test_values_that_belong_to_a_region():
    assert WrittenClasses.of(REGIONS).members == ((2, 4, 9), (4, 9), (9,))
    assert WrittenClasses.of(REGIONS, ["active", "whole"]).members == ((2, 9), (9,))
    assert WrittenClasses.of(CLASSES).members == ((300,), (7,))


def test_classes_that_are_not_there():
    with pytest.raises(ConfigError, match=r"^--classes: no class 'kidney'; choose from spleen, liver$"):
        WrittenClasses.of(CLASSES, ["liver", "kidney"])
    with pytest.raises(ConfigError, match="no class 'background'; choose from whole, core, active"):
        WrittenClasses.of(REGIONS, ["background"])
    with pytest.raises(ConfigError, match="no class is given; choose from spleen, liver"):
        WrittenClasses.of(CLASSES, [])
