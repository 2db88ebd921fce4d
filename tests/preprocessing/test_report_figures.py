"""Numbers and pictures of the report of preprocessing, by hand-made readings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.preprocessing import report_numbers
from ukbob_seg.preprocessing.fingerprint import IntensityStatistics
from ukbob_seg.preprocessing.fingerprint_cases import CaseFingerprint, CaseReading
from ukbob_seg.preprocessing.normalization import ChannelNormalization
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan
from ukbob_seg.preprocessing.report_figures import (
    SliceView,
    class_color,
    class_rows_figures,
    histogram_figure,
    patch_figure,
    size_figure,
    slices_figure,
)
from ukbob_seg.preprocessing.report_numbers import (
    ChannelHistogram,
    channel_histograms,
    choose_cases,
    class_sizes,
    find_outliers,
    matching_readings,
)

ZSCORE = ChannelNormalization("zscore")


def sizes(name: str, shape: tuple[int, int, int] = (10, 20, 30), z_mm: float = 3.0) -> CaseFingerprint:
    return CaseFingerprint(name, shape, (z_mm, 1.0, 0.7), shape, 2)


def classes(count: int) -> LabelScheme:
    return LabelScheme(tuple(f"organ {k}" for k in range(1, count + 1)), tuple((k,) for k in range(1, count + 1)))


def readings(rng: np.random.Generator, cases: int, count: int, samples: int, channels: int = 1) -> list[CaseReading]:
    result = []
    for case in range(cases):
        labels = rng.integers(1, count + 1, samples).astype(np.uint16)
        values = (100.0 * labels + rng.normal(0, 5, (channels, samples))).astype(np.float32)
        voxels = {int(k): 7 * int(n) for k, n in zip(*np.unique(labels, return_counts=True), strict=True)}
        result.append(CaseReading(f"key {case}", (), sizes(f"case {case}"), voxels, values, labels))
    return result


def statistics(found: list[CaseReading], samples: int, channel: int = 0) -> IntensityStatistics:
    values = np.concatenate([r.samples[channel, :samples] for r in found]).astype(float)
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    return IntensityStatistics(values.mean(), median, values.std(), values.min(), values.max(), low, high)


@pytest.mark.parametrize("batch", [1, 100, 10**6])
def test_histograms_count_every_sample_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(report_numbers, "BATCH_SAMPLES", batch)
    found, used = readings(rng, 9, 4, 50, 2), 40
    both = [statistics(found, used, k) for k in range(2)]
    for channel, histogram in enumerate(channel_histograms(found, classes(4), both, [ZSCORE, ZSCORE], used)):
        values = np.concatenate([r.samples[channel, :used] for r in found])
        labels = np.concatenate([r.sample_labels[:used] for r in found])
        assert histogram.foreground.sum() == values.size
        np.testing.assert_array_equal(histogram.foreground[1:-1], np.histogram(values, histogram.edges)[0])
        for k in range(4):
            of_class = values[labels == k + 1]
            assert histogram.counts[k].sum() == of_class.size
            assert histogram.medians()[k] == pytest.approx(np.median(of_class), abs=2 * np.diff(histogram.edges)[0])
            per_case = [r.samples[channel, :used][r.sample_labels[:used] == k + 1].mean(dtype=float) for r in found]
            assert histogram.typical[k] == pytest.approx(np.median(per_case))


def test_regions_overlap(rng: np.random.Generator) -> None:
    scheme = LabelScheme(("all", "two"), ((1, 2, 3), (2,)), region_values=(1, 2))
    found = readings(rng, 6, 3, 60)
    (histogram,) = channel_histograms(found, scheme, [statistics(found, 60)], [ZSCORE], 60)
    np.testing.assert_array_equal(histogram.counts[0], histogram.foreground)
    assert histogram.counts[1].sum() == sum(int((r.sample_labels == 2).sum()) for r in found)
    measured = class_sizes(found, scheme)
    assert measured.cases.tolist() == [6, 6]
    assert measured.voxels[0] == 7 * 60
    assert measured.volume_ml[0] == pytest.approx(7 * 60 * 2.1 / 1000)


def test_whole_numbers_get_whole_bins(rng: np.random.Generator) -> None:
    found = [
        dataclasses.replace(r, samples=rng.integers(0, 40, r.samples.shape).astype(np.float32))
        for r in readings(rng, 3, 2, 200)
    ]
    (histogram,) = channel_histograms(found, classes(2), [statistics(found, 200)], [ZSCORE], 200)
    assert np.diff(histogram.edges) == pytest.approx(1)
    assert histogram.edges[0] % 1 == 0.5


def test_cases_on_another_scale_do_not_squeeze_the_others(rng: np.random.Generator) -> None:
    found = readings(rng, 20, 3, 100)
    found[4] = dataclasses.replace(found[4], samples=found[4].samples * 1000)
    (histogram,) = channel_histograms(found, classes(3), [statistics(found, 100)], [ZSCORE], 100)
    assert histogram.edges[-1] < 2000
    assert histogram.beyond == pytest.approx(0.05)
    window = ChannelNormalization("ct_window", clip_low=-175.0, clip_high=5000.0)
    (histogram,) = channel_histograms(found, classes(3), [statistics(found, 100)], [window], 100)
    assert histogram.edges[0] < -175
    assert histogram.edges[-1] > 5000


def test_constant_intensities_and_absent_classes() -> None:
    same = CaseReading("k", (), sizes("a"), {1: 5}, np.full((1, 5), 0.5, np.float32), np.ones(5, np.uint16))
    (histogram,) = channel_histograms([same], classes(2), [statistics([same], 5)], [ZSCORE], 5)
    assert histogram.beyond == 0
    assert histogram.typical[0] == 0.5
    assert np.isnan(histogram.typical[1])
    assert np.isnan(histogram.medians()[1])
    assert class_sizes([same], classes(2)).cases.tolist() == [1, 0]


def test_outliers_are_judged_robustly() -> None:
    cases = [sizes(f"case {k}", (10 + k % 3, 20, 30)) for k in range(9)]
    assert find_outliers(cases) == []
    assert find_outliers([*cases[:3], sizes("thick", z_mm=9.0)]) == []  # too few
    found = find_outliers([*cases, sizes("thick", z_mm=9.0), sizes("long", (11, 20, 60)), sizes("fine", z_mm=3.1)])
    assert {o.case: o.what for o in found} == {"long": "size x, voxels", "thick": "spacing z, mm"}
    assert [o.value for o in found if o.case == "thick"] == [9.0]
    assert all(o.deviations > 3 for o in found)


def test_outlying_intensities_name_the_channel(rng: np.random.Generator) -> None:
    found = readings(rng, 8, 2, 200, channels=2)
    found[5].samples[1] -= 1000
    outliers = find_outliers([r.sizes for r in found if r.sizes is not None], found, ("T1", "T2"))
    assert [(o.case, o.what) for o in outliers] == [("case 5", "mean intensity, T2")]
    assert outliers[0].deviations < -3


def test_choice_of_cases_and_readings(rng: np.random.Generator) -> None:
    cases = [sizes("b", (1, 1, 9)), sizes("a", (1, 1, 3)), sizes("d", (1, 1, 5)), sizes("c", (1, 1, 4))]
    assert [(c.name, word) for c, word in choose_cases(cases)] == [("a", "smallest"), ("d", "median"), ("b", "largest")]
    assert [c.name for c, _ in choose_cases(cases[:2])] == ["a", "b"]
    assert [c.name for c, _ in choose_cases([sizes("x", z_mm=2), sizes("y", z_mm=1), sizes("z", z_mm=3)])] == list(
        "yxz"
    )
    found = readings(rng, 3, 2, 4)
    wanted = [sizes("case 2"), sizes("case 0", (9, 9, 9)), sizes("case 1")]
    assert [r.key for r in matching_readings(wanted, found)] == ["key 2", "key 1"]


@pytest.mark.parametrize(("count", "figures"), [(11, 1), (40, 1), (72, 2), (138, 4)])
def test_rows_hold_every_class_once(rng: np.random.Generator, count: int, figures: int) -> None:
    histogram = ChannelHistogram(np.arange(21.0), rng.integers(1, 9, (count, 22)), np.ones(22), np.ones(count))
    drawn = list(class_rows_figures(histogram, [f"organ {k}" for k in range(count)]))
    assert len(drawn) == figures
    names = [label.get_text() for figure, _ in drawn for label in figure.axes[0].get_yticklabels()]
    assert sorted(names) == sorted(f"organ {k}" for k in range(count))
    order = [int(name.split()[1]) for name in names]
    assert (np.diff(histogram.medians()[order]) >= 0).all()
    empty = dataclasses.replace(histogram, counts=np.zeros((count, 22), dtype=int))
    assert list(class_rows_figures(empty, [""] * count)) == []


def test_histogram_marks_what_the_plan_does() -> None:
    histogram = ChannelHistogram(np.linspace(-10, 10, 5), np.ones((2, 6), int), np.full(6, 2), np.ones(2))
    plan = ChannelNormalization("ct", clip_low=-8.0, clip_high=8.0, mean=1.0, std=2.0)
    figure = histogram_figure(histogram, ["liver", "spleen"], plan)
    assert [text.get_text() for text in figure.axes[0].texts] == ["clip -8", "clip 8", "mean 1"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["all foreground", "liver", "spleen"]
    assert not histogram_figure(histogram, ["liver", "spleen"], ZSCORE).axes[0].texts


def test_sizes_and_patches_are_drawn_to_scale() -> None:
    figure = size_figure([sizes("a"), sizes("b", (14, 20, 30))], (2.0, 1.0, 1.0))
    assert isinstance(figure, Figure)
    assert figure.axes[3].lines[0].get_xdata()[0] == 2.0
    network = NetworkPlan((4, 64, 32), 2, {}, 1.0)
    plan = ConfigurationPlan((3.0, 1.0, 0.5), (10, 100, 80), 3, {"net": network})
    figure = patch_figure({"3d_fullres": plan, "bare": dataclasses.replace(plan, networks={})})
    boxes = [(p.get_width(), p.get_height()) for p in figure.axes[0].patches]  # across z: x to the right, y up
    assert boxes == [(40, 100), (16, 64)]
    assert [(p.get_width(), p.get_height()) for p in figure.axes[1].patches][1] == (16, 12)
    assert len(figure.axes[3].patches) == 1


@pytest.mark.parametrize("normal", [0, 1])
def test_slices_share_a_frame_in_mm(normal: int) -> None:
    labels = np.zeros((10, 20), dtype=np.uint8)
    labels[2:4, 5:9] = 1
    before = SliceView("before", np.ones((2, 10, 20)), labels, (3.0, 0.5), (0.0, 0.0), ((0, 1), (0, 1)), "note")
    after = SliceView(
        "after", np.ones((2, 12, 6)), labels[:6, :6].repeat(2, 0), (1.5, 1.0), (6.0, 2.0), ((0, 1), (0, 1))
    )
    figure = slices_figure([before, after], normal, ["T1", "T2"], ["liver"])
    assert len(figure.axes) == 4
    for axis in figure.axes:
        assert axis.get_xlim() == (0, 10)
        assert axis.get_ylim() == ((30, 0) if normal == 0 else (0, 30))
        assert axis.get_aspect() == 1
    image, drawn = figure.axes[1].images[0], figure.axes[0].collections[0]
    assert tuple(image.get_extent()) == (2.0, 8.0, 24.0, 6.0)
    assert isinstance(drawn, LineCollection)
    ends = np.concatenate(drawn.get_segments())
    np.testing.assert_allclose([ends.min(axis=0), ends.max(axis=0)], [(2.5, 6.0), (4.5, 12.0)])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["liver"]


def test_colors_of_many_classes_differ() -> None:
    for count in (2, 10, 138):
        assert len({class_color(k, count) for k in range(count)}) == count
    assert class_color(254, 3) == class_color(3, 3)
