"""The same organ under different names: what zero-shot scoring and submissions match classes by."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.errors import ConfigError, DatasetError, listing

ADRENALS = "adrenal_glands"
ADRENAL_SIDES = ("adrenal_gland_right", "adrenal_gland_left")

# Common name -> other names. Order of words, case, separators, and left/l/lt do not matter.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "spleen": ("spl",),
    "kidney_right": ("rkidney", "rk", "rkid", "r kid"),
    "kidney_left": ("lkidney", "lk", "lkid", "l kid"),
    "gallbladder": ("gall bladder", "gall"),
    "esophagus": ("oesophagus", "eso"),
    "liver": ("liv",),
    "stomach": ("sto",),
    "aorta": ("abdominal aorta", "aor", "arota"),  # the last is how the dataset.json of AMOS spells it
    "inferior_vena_cava": (
        "postcava",
        "postcava vein",
        "ivc",
        "vena cava inferior",
        "inferior cava",
        "inferior vena cava ivc",
    ),
    "portal_vein_and_splenic_vein": (
        "portal vein splenic vein",
        "portal and splenic veins",
        "portal splenic vein",
        "veins",
    ),
    "pancreas": ("pan",),
    "adrenal_gland_right": ("adrenal right", "right adrenals", "rad", "suprarenal gland right"),
    "adrenal_gland_left": ("adrenal left", "left adrenals", "lad", "suprarenal gland left"),
    ADRENALS: ("adrenal gland", "adrenals", "adrenal", "left and right adrenal glands", "suprarenal glands"),
    "duodenum": (),
    "urinary_bladder": ("bladder",),
    "prostate_uterus": ("prostate or uterus", "prostate and uterus", "prostate", "uterus"),
    "necrotic_core": ("ncr", "ncr net", "necrosis", "necrotic tumour core", "necrotic tumor core"),
    "edema": ("ed", "oedema", "peritumoral edema", "peritumoural oedema", "snfh"),
    "enhancing_tumour": ("et", "enhancing tumor", "enhancing", "gd enhancing tumor"),
}

_TEN = (
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "inferior_vena_cava",
    ADRENALS,
    "aorta",
)
# What a model of UKBOB's classes is scored on. "ten" is the paper's table; that the 11th of BTCV is the pancreas, and
# that the 12 of AMOS are its 13 with the adrenal glands merged, is our reading: the paper gives the numbers alone.
SCORED: dict[str, tuple[str, ...]] = {
    "ten": _TEN,
    "btcv": (*_TEN, "pancreas"),
    "amos": (*_TEN, "pancreas", "duodenum"),
}
# Common names that several of a scheme's classes make up together.
MERGED: dict[str, tuple[str, ...]] = {ADRENALS: ADRENAL_SIDES}

# Common names that stand for whatever of several organs a patient has.
EITHER = frozenset({"prostate_uterus"})

_SIDES = {"l": "left", "lt": "left", "r": "right", "rt": "right"}
_FILLERS = frozenset({"and", "or", "the", "of"})


def _key(name: str) -> frozenset[str]:
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return frozenset(_SIDES.get(word, word) for word in words) - _FILLERS


_BY_KEY = {_key(alias): name for name, aliases in SYNONYMS.items() for alias in (name, *aliases)}


def common_name(name: str) -> str | None:
    """The common name of a class, or None for one that no protocol knows.

    ``Left Kidney``, ``kidney_l`` and ``left_kidney`` are ``kidney_left``; ``postcava`` is ``inferior_vena_cava``.
    """
    return _BY_KEY.get(_key(name))


def common_values(scheme: LabelScheme, what: str) -> dict[str, tuple[int, ...]]:
    """File values of every common name that a scheme's classes amount to; left plus right makes a merged class, too.

    Args:
        scheme: classes, not regions.
        what: it describes, for messages.

    Raises:
        ConfigError: regions.
        DatasetError: two classes of one common name.
    """
    if scheme.has_regions:
        raise ConfigError(f"the {what} has regions, which cannot be matched by name; use ukbob_evaluate")
    found: dict[str, tuple[int, ...]] = {}
    named: dict[str, str] = {}
    for name, values in zip(scheme.names, scheme.members, strict=True):
        common = common_name(name)
        if common is None:
            continue
        if common in found and common not in EITHER:
            raise DatasetError(f"the {what} has two classes for {common}: {named[common]} and {name}")
        found[common], named[common] = (*found.get(common, ()), *values), name
    for merged, parts in MERGED.items():
        together = tuple(value for part in parts for value in found.get(part, ()))
        if all(part in found for part in parts):
            found[merged] = (*found.get(merged, ()), *together)
    return found


def mapped_values(scheme: LabelScheme, protocol: str, what: str) -> dict[str, tuple[int, ...]]:
    """File values of every class that a protocol scores.

    Raises:
        ConfigError: unknown protocol, or regions.
        DatasetError: the scheme lacks classes of the protocol; names them.
    """
    if protocol not in SCORED:
        raise ConfigError(f"--protocol must be one of {', '.join(SCORED)}, got {protocol!r}")
    found = common_values(scheme, what)
    missing = [name for name in SCORED[protocol] if name not in found]
    if missing:
        raise DatasetError(
            f"the {what} has no class for {_listing(missing)}, which protocol {protocol} scores; it has "
            f"{_listing(scheme.names)}"
        )
    return {name: found[name] for name in SCORED[protocol]}


def _listing(names: Iterable[str]) -> str:
    return listing(list(names), 20)
