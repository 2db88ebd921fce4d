"""Figures of the paper, for comparison; nothing here was measured with this toolkit.

Reference: Bourigault, Jamaludin, Hamdi, "UKBOB: One Billion MRI Labeled Masks for Generalizable 3D Medical Image
Segmentation", ICCV 2025.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One system of one table.

    Attributes:
        system: as the paper calls it.
        dice: mean over classes.
        hd_mm: Hausdorff distance in mm, or None where we have no figure.
    """

    system: str
    dice: float
    hd_mm: float | None = None


@dataclass(frozen=True)
class PaperTable:
    """The paper's rows on one question.

    Attributes:
        title: for people.
        rows: of the paper.
        classes: numbers of classes with which a score can stand beside them.
    """

    title: str
    rows: tuple[PaperRow, ...]
    classes: tuple[int, ...]


PAPER_TABLES = {
    "ukbob": PaperTable(
        "UKBOB, 72 classes, five-fold cross validation",
        (
            PaperRow("ResUNet++", 0.876, 9.43),
            PaperRow("MedFormer", 0.881, 8.82),
            PaperRow("UNETR", 0.902, 7.97),
            PaperRow("nnU-Net", 0.915, 6.44),
            PaperRow("Swin-UNETR", 0.918, 5.98),
        ),
        (72,),
    ),
    "btcv": PaperTable(
        "BTCV, 12 classes (adrenal glands merged)",
        (
            PaperRow("nnU-Net", 0.802),
            PaperRow("UNETR", 0.856),
            PaperRow("Swin-UNETR", 0.869),
            PaperRow("Swin-BOB", 0.892),
            PaperRow("Swin-BOB, 10 models averaged", 0.897),
        ),
        (12,),
    ),
    "brats": PaperTable(
        "BRATS 2023 adult glioma, regions WT, TC, ET",
        (PaperRow("Swin-UNETR", 0.886, 9.02), PaperRow("Swin-BOB", 0.894, 8.65)),
        (3,),
    ),
    "amos": PaperTable(
        "AMOS MRI, 13 organs, adaptation at test time",
        (PaperRow("Swin-BOB", 0.847), PaperRow("Swin-BOB + TTA", 0.857), PaperRow("Swin-BOB + ETTA", 0.864)),
        (13,),
    ),
    "btcv-adaptation": PaperTable(
        "BTCV, adaptation at test time",
        (
            PaperRow("nnU-Net", 0.804),
            PaperRow("nnU-Net + TTA", 0.811),
            PaperRow("nnU-Net + ETTA", 0.831),
            PaperRow("Swin-BOB", 0.883),
            PaperRow("Swin-BOB + TTA", 0.883),
            PaperRow("Swin-BOB + ETTA", 0.892),
        ),
        (12,),
    ),
    "brats-adaptation": PaperTable(
        "BRATS 2023, adaptation at test time",
        (PaperRow("Swin-BOB", 0.882), PaperRow("Swin-BOB + TTA", 0.887), PaperRow("Swin-BOB + ETTA", 0.894)),
        (3,),
    ),
    "amos-zero-shot": PaperTable(
        "AMOS MRI, zero-shot, by the filter of the UKBOB labels",
        (
            PaperRow("TotalVibe", 0.796),
            PaperRow("no filter", 0.818),
            PaperRow("volume", 0.832),
            PaperRow("SOLF", 0.840),
        ),
        (10, 12),
    ),
    "btcv-zero-shot": PaperTable(
        "BTCV, zero-shot, by the filter of the UKBOB labels",
        (
            PaperRow("TotalVibe", 0.792),
            PaperRow("no filter", 0.856),
            PaperRow("volume", 0.875),
            PaperRow("SOLF", 0.882),
        ),
        (10, 11),
    ),
}
