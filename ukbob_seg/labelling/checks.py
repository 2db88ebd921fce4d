"""Whether the structures of a label map lie where a patient has them: what a wrong orientation in a file breaks.

A network finds organs by their looks, mostly, so a file whose header says head where the feet are gives lungs below
the hips. That is what is looked for here; nothing is corrected.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ukbob_seg.dataset.image_io import Geometry
from ukbob_seg.dataset.labels import left_right_pairs
from ukbob_seg.dataset.orientation import is_oblique, orientation_of

LEAST_VOXELS = 20  # smaller structures may be anything
# Along each axis of the patient (0 left, 1 posterior, 2 superior): structures that lie further that way than others.
HIGHER = (
    "lung_upper_lobe_left", "lung_upper_lobe_right", "lung_lower_lobe_left", "lung_lower_lobe_right", "heart",
    "trachea", "sternum", "humerus_left", "humerus_right", "clavicula_left", "clavicula_right",
)  # fmt: skip
LOWER = ("urinary_bladder", "hip_left", "hip_right", "femur_left", "femur_right", "sacrum", "prostate")
BEHIND = (
    "vertebra_body", "vertebra_posterior_elements", "spinal_cord", "spinal_channel", "autochthon_left",
    "autochthon_right", "sacrum",
)  # fmt: skip
BEFORE = ("sternum", "stomach", "urinary_bladder", "heart", "liver", "intestine")


def orientation_warnings(labels: np.ndarray, geometry: Geometry, values: Mapping[str, int]) -> list[str]:
    """One sentence for each way in which a scan seems turned; none where too little is there to say.

    Args:
        labels: (Z, Y, X) label values.
        geometry: of the file.
        values: label values by name, those of ``benchmark/totalvibe.py`` for the first two axes; left and right are
            told by any names that differ in these words alone.
    """
    warnings = []
    if is_oblique(geometry):
        warnings.append("the image is oblique to the patient's axes; the network expects straight ones")
    places = _centroids(labels, geometry, values)
    names = list(places)
    sides = [(names[i], names[j]) for i, j in left_right_pairs(names)]
    pairs = [(a, b) if "left" in a.lower() else (b, a) for a, b in sides]
    for axis, ordered, said in (
        (2, [(a, b) for a in HIGHER for b in LOWER], "structures of the chest lie below those of the pelvis"),
        (1, [(a, b) for a in BEHIND for b in BEFORE], "the spine lies before the organs"),
        (0, pairs, "left structures lie right of their right partners"),
    ):
        known = [(places[a][axis], places[b][axis]) for a, b in ordered if a in places and b in places]
        wrong = sum(one < other for one, other in known)
        if wrong > len(known) / 2:
            warnings.append(
                f"{said} ({wrong} of {len(known)} pairs): the file says {orientation_of(geometry)}; if that is "
                "wrong, correct its orientation and label it again, else these labels are"
            )
    return warnings


def _centroids(labels: np.ndarray, geometry: Geometry, values: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Place (left, posterior, superior) in mm of each structure that is there."""
    size = int(max([labels.max(initial=0), *values.values()])) + 1
    flat = labels.ravel()
    counts = np.bincount(flat, minlength=size)
    index = np.zeros((size, 3))
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = labels.shape[axis]
        along = np.broadcast_to(np.arange(labels.shape[axis], dtype=np.float64).reshape(shape), labels.shape)
        index[:, axis] = np.bincount(flat, weights=along.ravel(), minlength=size)
    columns = np.asarray(geometry.direction, dtype=float).reshape(3, 3)[:, ::-1] * np.asarray(geometry.spacing_mm)
    return {
        name: columns @ (index[value] / counts[value]) + np.asarray(geometry.origin_mm)
        for name, value in values.items()
        if counts[value] >= LEAST_VOXELS
    }
