"""A label map as DICOM Segmentation: one segment per class, on the slices of the series that was segmented."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ukbob_seg import __version__
from ukbob_seg.conversion.dicom_series import Series
from ukbob_seg.conversion.dicom_tags import first_line
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import atomic_path
from ukbob_seg.inference.export import WrittenClasses

MAKER = "ukbob_seg"
_EMPTY_ALLOWED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_SIDES = {"left": "Left", "right": "Right"}
# Where the English name is not the keyword in the dictionary of SNOMED CT terms that pydicom brings along.
_SYNONYMS = {
    "urinary_bladder": "Bladder", "oesophagus": "Esophagus", "postcava": "InferiorVenaCava", "adrenal": "AdrenalGland",
    "gall_bladder": "Gallbladder", "vertebral_column": "Spine", "small_bowel": "SmallIntestine",
    "thyroid_gland": "Thyroid", "lung_upper_lobe": "UpperLobeOfLung", "lung_lower_lobe": "LowerLobeOfLung",
}  # fmt: skip
_LESIONS = {"tumor": "Neoplasm", "tumour": "Neoplasm", "cancer": "Neoplasm", "lesion": "Lesion", "edema": "Edema",
            "oedema": "Edema", "necrosis": "Necrosis", "cyst": "Cyst"}  # fmt: skip


def load_highdicom() -> Any:
    """highdicom, which is an extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import highdicom
        import highdicom.seg
    except ImportError as error:
        raise ConfigError("DICOM Segmentations need highdicom: pip install 'ukbob_seg[dicom]'") from error
    return highdicom


def coded_terms(name: str) -> tuple[Any, Any, Any | None]:
    """SNOMED CT terms of a class: (category, type, side or None).

    Organs are found by their name in pydicom's dictionary, with ``left`` and ``right`` as modifier; words such as
    tumour are abnormal structures. A class that neither knows is a tissue: its label says what it is.
    """
    from pydicom.sr.codedict import codes

    words = name.lower().replace("-", "_").replace(" ", "_").split("_")
    sides = [_SIDES[word] for word in words if word in _SIDES]
    rest = [word for word in words if word and word not in _SIDES]
    side = getattr(codes.SCT, sides[0]) if len(sides) == 1 else None
    for word in rest:
        if word in _LESIONS and hasattr(codes.SCT, _LESIONS[word]):
            return codes.SCT.MorphologicallyAbnormalStructure, getattr(codes.SCT, _LESIONS[word]), side
    joined = "_".join(rest)
    keyword = _SYNONYMS.get(joined, "".join(word.capitalize() for word in rest))
    if keyword.isidentifier() and hasattr(codes.SCT, keyword):
        return codes.SCT.AnatomicalStructure, getattr(codes.SCT, keyword), side
    return codes.SCT.Tissue, codes.SCT.Tissue, side


def write_dicom_seg(labels: np.ndarray, written: WrittenClasses, series: Series, path: Path) -> None:
    """Write a label map as a binary DICOM Segmentation, atomically. Segment k + 1 is the k-th written class.

    Args:
        labels: (Z, Y, X) label values, plane by plane the slices of ``series``.
        written: names and values.
        series: that was segmented; the object refers to its slices and shares its frame of reference.
        path: of the object.

    Raises:
        ConfigError: highdicom is not installed.
        DatasetError: another number of slices, or the series lacks what the object has to refer to.
    """
    load_highdicom()
    if labels.shape != series.geometry.shape:
        raise DatasetError(f"{path}: labels of shape {labels.shape} for a series of {series.geometry.shape}")
    sources = [each.dataset for each in series.slices]
    for dataset in sources:
        if "FrameOfReferenceUID" not in dataset or "StudyInstanceUID" not in dataset:
            raise DatasetError(f"series {series.number}: slices without FrameOfReferenceUID cannot be referred to")
        for tag in _EMPTY_ALLOWED:
            if tag not in dataset:
                setattr(dataset, tag, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values in the scanner's own tags
        try:
            segmentation = _segmentation(labels, written, series)
        except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
            raise DatasetError(
                f"{path}: no DICOM Segmentation can refer to series {series.number} ({first_line(error)}); the label "
                "map is written; export the series again, or predict without --dicom-seg"
            ) from error
        with atomic_path(path) as temporary:
            segmentation.save_as(temporary)


def _segmentation(labels: np.ndarray, written: WrittenClasses, series: Series) -> Any:
    highdicom = load_highdicom()
    return highdicom.seg.Segmentation(
        source_images=[each.dataset for each in series.slices],
        pixel_array=_segments(labels, written),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=_descriptions(written),
        series_instance_uid=highdicom.UID(),
        series_number=series.number + 1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=MAKER,
        software_versions=__version__,
        device_serial_number="0",
        omit_empty_frames=bool(labels.any()),
        content_label="SEGMENTATION",
        series_description=f"{series.description[:50]} segmented".strip(),
    )


def _segments(labels: np.ndarray, written: WrittenClasses) -> np.ndarray:
    """Segment numbers (Z, Y, X), or, where classes overlap, (Z, Y, X, segments) of 0 and 1."""
    values = [value for group in written.members for value in group]
    if len(set(values)) < len(values):
        return np.stack([np.isin(labels, group) for group in written.members], axis=-1).astype(np.uint8)
    table = np.zeros(max(int(labels.max()), *values) + 1, dtype=np.uint8 if len(values) < 256 else np.uint16)
    for number, group in enumerate(written.members, 1):
        table[list(group)] = number
    return table[labels]


def _descriptions(written: WrittenClasses) -> list[Any]:
    from pydicom.sr.codedict import codes

    highdicom = load_highdicom()
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=MAKER, version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    descriptions = []
    for number, name in enumerate(written.names, 1):
        category, kind, side = coded_terms(name)
        description = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        if side is not None:
            modifier = highdicom.sr.CodedConcept(side.value, side.scheme_designator, side.meaning)
            description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
        descriptions.append(description)
    return descriptions
