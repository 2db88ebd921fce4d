"""In which order structures win when the label maps of several Dixon channels are merged.

TotalVibeSegmentator takes one channel at a time. Its authors label in-phase, water and out-of-phase images and merge
the maps group by group: a voxel goes to the first group, and within it to the first channel, that claims it. Thin and
reliable structures come first; tissue that fills the rest comes last. Two groups are taken from the water image alone
where it is there: in others their structures spread.
"""

from __future__ import annotations

from dataclasses import dataclass

VOXEL_MM3 = 14.9  # of UK Biobank's stitched images, 2.232 x 2.232 x 3 mm, in which the authors count


@dataclass(frozen=True)
class FusionGroup:
    """Structures of equal priority.

    Attributes:
        name: for the documentation.
        single: of one piece: of each channel's map only the largest component takes part.
        several: of several pieces, or branching ones.
        least_mm3: pieces of ``several`` below this volume take no part.
        channels: the only ones that count, where the cohort has them; None for all.
    """

    name: str
    single: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    least_mm3: float = 0.0
    channels: tuple[str, ...] | None = None


WATER = ("water",)
GROUPS = (
    FusionGroup(
        "vessels",
        several=(
            "adrenal_gland_right", "adrenal_gland_left", "aorta", "pulmonary_vein", "brachiocephalic_trunk",
            "subclavian_artery_right", "subclavian_artery_left", "common_carotid_artery_right",
            "common_carotid_artery_left", "brachiocephalic_vein_left", "brachiocephalic_vein_right",
            "atrial_appendage_left", "superior_vena_cava", "inferior_vena_cava", "portal_vein_and_splenic_vein",
            "iliac_artery_left", "iliac_artery_right", "iliac_vena_left", "iliac_vena_right",
        ),
        least_mm3=150 * VOXEL_MM3,
    ),
    FusionGroup(
        "lung",
        single=(
            "lung_upper_lobe_left", "lung_lower_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right",
            "lung_lower_lobe_right", "trachea",
        ),
    ),
    FusionGroup("nervous system", single=("spinal_cord", "spinal_channel")),
    FusionGroup(
        "prone to over-segmentation",
        several=("costal_cartilages", "vertebra_posterior_elements"),
        least_mm3=10 * VOXEL_MM3,
        channels=WATER,
    ),
    FusionGroup(
        "bone",
        single=(
            "sacrum", "humerus_left", "humerus_right", "scapula_left", "scapula_right", "clavicula_left",
            "clavicula_right", "femur_left", "femur_right", "hip_left", "hip_right", "sternum",
        ),
        several=("IVD", "vertebra_body", "bone_other"),
        least_mm3=10 * VOXEL_MM3,
    ),
    FusionGroup("digestion", single=("stomach", "pancreas", "esophagus", "intestine", "duodenum", "unused")),
    FusionGroup(
        "muscle",
        single=(
            "gluteus_maximus_left", "gluteus_maximus_right", "gluteus_medius_left", "gluteus_medius_right",
            "gluteus_minimus_left", "gluteus_minimus_right", "autochthon_left", "autochthon_right",
            "iliopsoas_left", "iliopsoas_right",
        ),
        channels=WATER,
    ),
    FusionGroup(
        "organs",
        single=(
            "spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "urinary_bladder", "prostate", "heart",
        ),
        several=("thyroid_gland",),
        least_mm3=50 * VOXEL_MM3,
    ),
    FusionGroup("rest", several=("subcutaneous_fat", "muscle", "inner_fat"), least_mm3=10 * VOXEL_MM3),
)  # fmt: skip
