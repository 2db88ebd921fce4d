"""Previews: which slices, which way up, in which proportions, in which colours."""

import itertools

import numpy as np
import pytest
from matplotlib.image import imread

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.inference import preview
from ukbob_seg.inference.export import WrittenClasses
from ukbob_seg.inference.preview import preview_figure, write_preview

SPACING = (3.0, 1.0, 0.7)
SHAPE = (20, 60, 90)
SCHEME = LabelScheme.from_json({"background": 0, "head": 2, "left arm": 7, "face": 300}, None)
WRITTEN = WrittenClasses.of(SCHEME)


def _patient():
    """Labels (S, P, L) of an LPS volume: a head above, a face in front, an arm on the left."""
    labels = np.zeros(SHAPE, np.uint16)
    labels[14:18, 20:40, 35:55] = 2
    labels[4:14, 5:12, 35:55] = 300
    labels[4:14, 20:40, 70:85] = 7
    return labels


def _stored(labels, order, backwards):
    """The same patient in another orientation: array axes are (S, P, L)[order], some of them backwards."""
    stored = np.flip(labels.transpose(order), backwards)
    direction = np.zeros((3, 3))
    for axis, patient in enumerate(order):  # column of x is the last array axis; row of L is 0
        direction[2 - patient, 2 - axis] = -1 if axis in backwards else 1
    spacing = tuple(SPACING[patient] for patient in order)
    return np.ascontiguousarray(stored), Geometry(stored.shape, spacing, (0.0, 0.0, 0.0), tuple(direction.ravel()))


ORIENTATIONS = [
    (order, backwards)
    for order in itertools.permutations(range(3))
    for backwards in ((), (0,), (1, 2), (0, 1, 2))
]  # fmt: skip


@pytest.mark.parametrize(("order", "backwards"), ORIENTATIONS)
def test_head_up_face_to_the_front_left_on_the_right(order, backwards):
    labels, geometry = _stored(_patient(), order, backwards)
    axial, coronal, sagittal = preview._panels(labels.astype(np.float32), labels, geometry)
    assert axial[0].size_mm == pytest.approx((60, 63))  # posterior 60 x 1, left 90 x 0.7, superior 20 x 3 mm
    assert coronal[0].size_mm == pytest.approx((60, 63))
    assert sagittal[0].size_mm == pytest.approx((60, 60))
    everything = [np.maximum.reduce([panel.labels for panel in row]) for row in (axial, coronal, sagittal)]

    def centre(row, value):
        return np.argwhere(everything[row] == value).mean(0) / everything[row].shape

    assert centre(0, 300)[0] < centre(0, 7)[0]  # axial: the face is above, the left arm on the right
    assert centre(0, 7)[1] > centre(0, 300)[1] + 0.2
    assert centre(1, 2)[0] < centre(1, 7)[0]  # coronal: the head is above, the left arm on the right
    assert centre(1, 7)[1] > centre(1, 2)[1] + 0.2
    assert centre(2, 2)[0] < centre(2, 300)[0]  # sagittal: the head is above, the face on the left
    assert centre(2, 300)[1] < centre(2, 7)[1]


@pytest.mark.parametrize(("order", "backwards"), ORIENTATIONS[::5])
def test_slices_are_named_in_the_voxels_of_the_file(order, backwards):
    labels, geometry = _stored(_patient(), order, backwards)
    image = np.zeros(labels.shape, np.float32)
    for axis in range(3):  # every voxel knows its place in the file
        image += np.arange(labels.shape[axis]).reshape([-1 if k == axis else 1 for k in range(3)]) * 100.0**axis
    for row in preview._panels(image, labels, geometry):
        for panel in row:
            letter, _, index = panel.name.split()
            places = panel.pixels.astype(np.int64) // 100 ** "zyx".index(letter) % 100
            assert (places == int(index)).all()


def test_slices_spread_over_the_foreground():
    present = np.zeros(100, bool)
    present[10:22] = present[60:66] = True
    assert preview._spread(present) == [11, 14, 17, 20, 61, 64]
    present[12:] = False
    assert preview._spread(present) == [10, 11]
    assert preview._spread(np.zeros(30, bool)) == [2, 7, 12, 17, 22, 27]


@pytest.mark.parametrize("spacing", [SPACING, (1.0, 1.0, 1.0)])
def test_millimetres_are_equally_long_in_all_panels(spacing):
    labels = _patient()
    figure = preview_figure("case", labels.astype(np.float32), labels, Geometry(SHAPE, spacing), WRITTEN)
    width, height = figure.get_size_inches()
    scales = []
    for axis in figure.axes:
        box, rows, columns = axis.get_position(), *axis.images[0].get_array().shape
        normal = "zyx".index(axis.texts[0].get_text()[0])
        high, wide = np.delete(spacing, normal)
        scales += [box.width * width / (columns * wide), box.height * height / (rows * high)]
    assert np.ptp(scales) < 1e-9 * scales[0]
    boxes = [axis.get_position() for axis in figure.axes]
    assert all(box.min.min() >= 0 and box.max.max() <= 1 + 1e-9 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_outlines_have_the_colours_of_the_legend():
    labels = _patient()
    labels[labels == 7] = 0
    figure = preview_figure("a$b$", labels.astype(np.float32), labels, Geometry(SHAPE, SPACING), WRITTEN)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["head", "face"]
    colors = {line.get_color() for line in legend.get_lines()}
    assert len(colors) == 2
    drawn = {tuple(color[:3]) for axis in figure.axes for color in axis.collections[0].get_colors()}
    assert drawn == colors
    texts = [text.get_text() for text in figure.texts]
    assert texts[:2] == ["a$b$", "20 x 60 x 90 voxels of 3 x 1 x 0.7 mm (z, y, x), 2 of 3 classes found"]


def test_an_outline_runs_around_its_class():
    labels = np.zeros((3, 6, 8), np.uint8)
    labels[1, 2:4, 3:7] = 2
    figure = preview_figure("case", np.ones(labels.shape, np.float32), labels, Geometry(labels.shape, SPACING), WRITTEN)
    (path,) = figure.axes[0].collections[0].get_paths()  # the axial slice
    x, y = path.vertices.T
    assert (np.nanmin(x), np.nanmax(x), np.nanmin(y), np.nanmax(y)) == (2.5, 6.5, 1.5, 3.5)
    assert np.isnan(x).sum() == 2 * (2 + 4)  # a gap behind each pixel edge


@pytest.mark.parametrize("occurring", [20, 21])
def test_many_classes(occurring):
    scheme = LabelScheme.from_json({"background": 0} | {f"organ {k}": k for k in range(1, 100)}, None)
    labels = np.zeros((4, 10, 10), np.uint8)
    labels.ravel()[: 4 * occurring] = np.repeat(np.arange(1, 4 * occurring, 4), 4)
    figure = preview_figure(
        "case", labels.astype(np.float32), labels, Geometry(labels.shape, SPACING), WrittenClasses.of(scheme)
    )
    assert len(figure.legends) == (occurring <= 20)
    if figure.legends:
        assert len({line.get_color() for line in figure.legends[0].get_lines()}) == 20


MANY = WrittenClasses.of(
    LabelScheme.from_json({"background": 0, **{f"organ {n}": n for n in range(1, 73)}}, None)
)  # fmt: skip


@pytest.mark.parametrize("written", [WRITTEN, MANY])
def test_a_picture_is_written_even_of_nothing(tmp_path, written):
    labels = np.zeros((4, 5, 6), np.uint8)
    image = np.zeros(labels.shape, np.float32)
    write_preview(tmp_path / "a_preview.png", "a", image, labels, Geometry(labels.shape, SPACING), written, (0.0, 0.0))
    pixels = imread(tmp_path / "a_preview.png")
    assert pixels.shape[0] > 300
    assert [path.name for path in tmp_path.iterdir()] == ["a_preview.png"]
    figure = preview_figure("a", image, labels, Geometry(labels.shape, SPACING), written)
    assert any("no foreground was predicted" in text.get_text() for text in figure.texts)


def test_a_small_organ_is_shown_with_its_surroundings():
    labels = np.zeros((60, 300, 400), np.uint8)
    labels[30, 150, 200] = 2
    axial, coronal, sagittal = preview._panels(labels.astype(np.float32), labels, Geometry(labels.shape, SPACING))
    assert axial[0].size_mm == pytest.approx((101, 101.5))  # the voxel, and at least 50 mm on either side
    assert coronal[0].size_mm == pytest.approx((105, 101.5))
    assert sagittal[0].size_mm == pytest.approx((105, 101))
