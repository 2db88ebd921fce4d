"""The report: what it says, which cases it picks, and what its outlines enclose."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ukbob_seg.dataset.image_io import Geometry, write_image, write_labels
from ukbob_seg.drawing import outline
from ukbob_seg.evaluation.distribution_figures import distribution_figures
from ukbob_seg.evaluation.evaluate import ReportOptions, evaluate
from ukbob_seg.evaluation.metrics import absent_from_both
from ukbob_seg.evaluation.pairing import find_image
from ukbob_seg.evaluation.report import worst_cases, write_report
from ukbob_seg.evaluation.summary import CaseMetrics, EvaluationSummary, collect

GEOMETRY = Geometry((10, 20, 24), (3.0, 1.0, 0.7))


def scores(dice: float, size: int = 10, hd: float = 1.0) -> dict[str, float]:
    return {**absent_from_both(), "dice": dice, "nsd": dice, "hd": hd, "hd95": hd, "assd": hd, "n_ref": size}


def many_classes(classes: int, cases: int, rng: np.random.Generator) -> EvaluationSummary:
    names = [f"organ {k}" for k in range(classes)]
    return collect([CaseMetrics(f"c{i}", {n: scores(rng.uniform(0.4, 1)) for n in names}) for i in range(cases)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Twelve cases (prediction, reference, images); the prediction of case k is shifted by k voxels along x."""
    for case in range(12):
        labels = np.zeros(GEOMETRY.shape, dtype=np.uint8)
        labels[3:8, 4:12, 1:9] = 1
        labels[3:8, 12:15, 1:9] = 2
        name = f"case_{case:02d}.nii.gz"
        write_labels(labels, GEOMETRY, tmp_path / "reference" / name)
        write_labels(np.roll(labels, case, 2), GEOMETRY, tmp_path / "prediction" / name)
        write_image(labels * 10.0, GEOMETRY, tmp_path / "images" / name.replace(".nii", "_0000.nii"))
    return tmp_path / "prediction", tmp_path / "reference", tmp_path / "images"


@pytest.mark.parametrize("with_images", [True, False])
def test_page_is_self_contained_and_names_everything(files: tuple[Path, Path, Path], with_images: bool) -> None:
    predictions, references, images = files
    evaluate(predictions, references, report=ReportOptions(images=images if with_images else None))
    page = (predictions / "report.html").read_text()
    assert page.count("<img") == 4  # overlays; Dice, HD95 and NSD of every case
    assert page.count("<details>") == 4  # NSD, HD95, HD, ASSD
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "mean over classes" in page
    for case in range(2, 12):
        assert f"<td>case_{case:02d}</td>" in page
    assert "<td>case_01</td>" not in page


def test_odd_images_fall_back_to_grey(files: tuple[Path, Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    predictions, references, images = files
    small = Geometry((4, 4, 4), (1.0, 1.0, 1.0))
    write_image(np.ones(small.shape, dtype=np.float32), small, images / "case_11_0000.nii.gz")
    (images / "case_10_0000.nii.gz").write_bytes(b"broken")
    (images / "case_09_0000.nii.gz").unlink()
    evaluate(predictions, references, report=ReportOptions(images=images))
    assert (predictions / "report.html").is_file()
    warned = " ".join(record.getMessage() for record in caplog.records)
    assert "case_11" in warned
    assert "case_10" in warned
    assert "case_08" not in warned


def test_worst_cases_come_first_and_show_their_worst_class() -> None:
    summary = collect(
        [
            CaseMetrics("good", {"a": scores(0.9), "b": scores(0.8)}),
            CaseMetrics("missed", {"a": scores(0.9), "b": scores(0.0, 5, np.inf), "c": scores(0.0, 50, np.inf)}),
            CaseMetrics("empty", {}),
            CaseMetrics("poor", {"a": scores(0.5, hd=7.0), "b": scores(0.6, hd=9.0)}),
        ],
        {"a": 1, "b": 2, "c": 3},
    )
    worst = worst_cases(summary)
    assert worst["case"].tolist() == ["missed", "poor", "good"]
    assert worst["worst_class"].tolist() == ["c", "a", "b"]
    assert worst["missed"].tolist() == [2, 0, 0]
    assert worst["hd95"].tolist() == pytest.approx([1, 8, 1])
    assert worst["dice"].tolist() == pytest.approx([0.3, 0.55, 0.85])
    assert len(worst_cases(summary, 1)) == 1


def test_report_without_files_or_foreground(tmp_path: Path) -> None:
    nothing = collect([CaseMetrics("a", {"x": absent_from_both()})])
    write_report(tmp_path / "nothing.html", nothing)
    page = (tmp_path / "nothing.html").read_text()
    assert "No case has any foreground" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    write_report(tmp_path / "tables.html", collect([CaseMetrics("<a&b>", {"x": scores(0.5)})]))
    assert "&lt;a&amp;b&gt;" in (tmp_path / "tables.html").read_text()


@pytest.mark.parametrize(("classes", "figures"), [(1, 1), (2, 1), (40, 1), (72, 2), (138, 4)])
def test_dice_figures_hold_every_class_once(classes: int, figures: int, rng: np.random.Generator) -> None:
    drawn = list(distribution_figures(many_classes(classes, 3, rng)))
    assert len(drawn) == figures
    names: list[str] = []
    for figure, _ in drawn:
        assert isinstance(figure, Figure)
        names += [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(names) == sorted(f"organ {k}" for k in range(classes))


def test_distances_of_missed_classes_are_drawn_at_the_end(rng: np.random.Generator) -> None:
    cases = [CaseMetrics(f"c{k}", {"x": scores(0.5, hd=float(k)), "y": scores(0.9, hd=1.0)}) for k in range(6)]
    cases += [CaseMetrics("m", {"x": scores(0.0, hd=np.inf)}), CaseMetrics("n", {"x": scores(0.0, hd=np.inf)})]
    ((figure, caption),) = distribution_figures(collect(cases), "hd95")
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["2"]
    assert axis.texts[0].xy == pytest.approx((5 * 1.06, 0))
    assert axis.get_xlim()[1] > 5 * 1.06
    assert axis.get_xlabel() == "HD95 (mm)"
    assert "infinite" in caption
    far = collect([*cases, CaseMetrics("far", {"x": scores(0.1, hd=200.0)})])
    ((figure, caption),) = distribution_figures(far, "hd95")
    assert figure.axes[0].get_xscale() == "symlog"
    assert "Logarithmic" in caption


def test_many_cases_are_a_density_with_the_worst_ten(rng: np.random.Generator) -> None:
    values = rng.uniform(0.3, 1, 600)
    summary = collect([CaseMetrics(f"c{k}", {"x": scores(v)}) for k, v in enumerate(values)])
    ((figure, caption),) = distribution_figures(summary)
    dots = [c for c in figure.axes[0].collections if len(c.get_offsets()) == 10]
    assert sorted(float(x) for x, _ in dots[0].get_offsets()) == pytest.approx(np.sort(values)[:10].tolist())
    assert caption.startswith("Shape: density")


def test_outline_encloses_the_mask(rng: np.random.Generator) -> None:
    pixel = np.zeros((4, 5), dtype=bool)
    pixel[2, 3] = True
    assert {tuple(map(tuple, segment)) for segment in outline(pixel)} == {
        ((2.5, 1.5), (2.5, 2.5)),
        ((3.5, 1.5), (3.5, 2.5)),
        ((2.5, 1.5), (3.5, 1.5)),
        ((2.5, 2.5), (3.5, 2.5)),
    }
    labels = rng.integers(0, 3, (7, 9))
    changes = sum(int((np.diff(np.pad(labels, 1), axis=axis) != 0).sum()) for axis in (0, 1))
    assert outline(labels).shape == (changes, 2, 2)
    assert outline(np.zeros((3, 3), dtype=bool)).shape == (0, 2, 2)


def test_find_image(tmp_path: Path) -> None:
    assert find_image(tmp_path, "a") is None
    (tmp_path / "a.nii").touch()
    assert find_image(tmp_path, "a") == tmp_path / "a.nii"
    (tmp_path / "a_0000.mha").touch()
    assert find_image(tmp_path, "a") == tmp_path / "a_0000.mha"
