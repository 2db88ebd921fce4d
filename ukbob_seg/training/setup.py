"""Everything a training run needs, gathered and checked before the first step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ukbob_seg.dataset.labels import LabelScheme, left_right_pairs
from ukbob_seg.dataset.paths import Roots, find_dataset
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.filtering.policies import LabelTrust, case_lookup
from ukbob_seg.networks.registry import check_patch
from ukbob_seg.preprocessing.fingerprint import Fingerprint
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.preprocessing.preprocessor import arrays_folder, preprocessing_recipe
from ukbob_seg.preprocessing.records import load_record
from ukbob_seg.training.augmentation import AugmentationSetup, Transform, make_transforms
from ukbob_seg.training.cascade import previous_stage_maps
from ukbob_seg.training.checkpoint import ModelDescription
from ukbob_seg.training.config import TrainingConfig, recipe
from ukbob_seg.training.losses import SigmoidDiceLoss, SoftmaxDiceLoss, with_deep_supervision
from ukbob_seg.training.sampling import TrainingCase
from ukbob_seg.training.splits import choose_split, load_groups, load_or_make_splits, take_subset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSetup:
    """A run, ready to start.

    Attributes:
        folder: ``results/DatasetXXX_Name/CONFIG__NETWORK/fold_K``.
        arrays: preprocessed configuration folder.
        spec: the dataset's contract.
        configuration: spacing and shapes.
        network: patch, batch and network arguments.
        description: what the checkpoints will say.
        train: cases to learn from, with what may be trusted in them.
        val: cases to validate on.
        recipe: hash of what made the preprocessed arrays.
        previous: in a cascade, the folder of the first stage's maps.
    """

    folder: Path
    arrays: Path
    spec: DatasetSpec
    configuration: ConfigurationPlan
    network: NetworkPlan
    description: ModelDescription
    train: tuple[TrainingCase, ...]
    val: tuple[TrainingCase, ...]
    recipe: str
    previous: Path | None = None


def default_network(dataset: int | str, roots: Roots, configuration: str) -> str:
    """The network that a configuration is trained with unless another is named."""
    plans = Plans.load(find_dataset(roots.preprocessed, dataset) / "plans.json")
    return plans.configuration(configuration).default_network


def choose_config(
    dataset: int | str, roots: Roots, network: str, pretrained: bool = False, **changes: Any
) -> TrainingConfig:
    """The recipe of the dataset's preset and the network, with the user's changes.

    Args:
        dataset: id or name of a planned dataset.
        roots: folders.
        network: registry name.
        pretrained: whether the run fine-tunes given weights.
        changes: fields of ``TrainingConfig``; None leaves the recipe's value.
    """
    plans = Plans.load(find_dataset(roots.preprocessed, dataset) / "plans.json")
    given = {key: value for key, value in changes.items() if value is not None}
    base = recipe(network, plans.preset, pretrained)
    if given.get("epochs", base.epochs) <= base.warmup_epochs:
        given.setdefault("warmup_epochs", 0)  # a shorter run than the recipe's warm-up has none
    return dataclasses.replace(base, **given)


def prepare(
    dataset: int | str,
    fold: str,
    roots: Roots,
    config: TrainingConfig,
    configuration: str,
    network: str,
    use_filter: bool,
) -> TrainingSetup:
    """Find the preprocessed dataset, its plans, splits and SOLF flags.

    Raises:
        ConfigError: unknown dataset, configuration, network or fold.
        DatasetError: not preprocessed, or unusable splits.
    """
    folder = find_dataset(roots.preprocessed, dataset)
    plans = Plans.load(folder / "plans.json")
    spec = DatasetSpec.from_json(DatasetSpec.load(folder).content, folder.name)
    plan = plans.configuration(configuration)
    network_plan = plan.network(network)
    check_patch(network, network_plan.arguments, network_plan.patch_size)
    arrays = arrays_folder(folder, plans, configuration)
    if not any(arrays.glob("*.json")):
        raise DatasetError(f"{folder.name} is not preprocessed for {configuration}; run ukbob_preprocess -d {dataset}")
    names = [case.name for case in Fingerprint.load(folder / "fingerprint.json").cases]
    raw = roots.raw / folder.name
    groups = load_groups(raw / "groups.csv", names)
    scheme = "80-10-10" if plans.preset == "ukbob" else "5-fold"
    splits = None if fold == "all" else load_or_make_splits(folder, names, groups, scheme)
    split = choose_split(splits, fold, names)
    train = take_subset(split.train, config.subset_fraction, config.seed, groups)
    recipe = preprocessing_recipe(plans, plan, spec)
    val = split.val[: config.validation_cases or None]
    _check_arrays(arrays, (*train, *split.val), recipe)
    trust = LabelTrust.load(folder / "solf") if use_filter else None
    head = "sigmoid" if spec.labels.has_regions or config.loss == "bce_dice" else "softmax"
    description = ModelDescription(
        network=network,
        arguments=dict(network_plan.arguments),
        configuration=configuration,
        fold=fold,
        head=head,
        mirror_axes=_safe_mirror_axes(
            # A patch of one slice looks the same flipped across it, but its labels would be exchanged.
            [a for a in config.mirror_axes if config.augmentation != "none" and a != plan.slice_axis],
            spec.labels,
            plans.left_right_axis,
        ),
        plans=plans.to_json(),
        dataset=spec.content,
    )
    model_folder = roots.results / folder.name / f"{configuration}__{network.replace(':', '.')}"
    previous = None
    if plan.previous_stage is not None:
        first_stage = model_folder.with_name(f"{plan.previous_stage}__{network.replace(':', '.')}")
        maps = folder / "previous_stage" / f"{first_stage.name}__{arrays.name}"
        previous = previous_stage_maps(first_stage, arrays, maps, (*train, *val), spec)
    return TrainingSetup(
        folder=model_folder / f"fold_{fold}",
        arrays=arrays,
        spec=spec,
        configuration=plan,
        network=network_plan,
        description=description,
        recipe=recipe,
        previous=previous,
        train=_trusted(train, trust, spec.labels, "training"),
        val=_trusted(val, trust, spec.labels, "validation"),
    )


def _check_arrays(arrays: Path, names: Sequence[str], recipe: str) -> None:
    """Refuse arrays that were made by other plans than those in force.

    Raises:
        DatasetError: names the case.
    """
    for name in names:
        if load_record(arrays, name).get("recipe") != recipe:
            raise DatasetError(
                f"case {name} was preprocessed before plans.json or the labels in dataset.json changed; "
                "run ukbob_preprocess again"
            )


def _trusted(
    names: Sequence[str], trust: LabelTrust | None, scheme: LabelScheme, what: str
) -> tuple[TrainingCase, ...]:
    """Apply the filter's decisions: drop scans, and give the others their lookup table."""
    if trust is None:
        return tuple(TrainingCase(name) for name in names)
    kept = [name for name in names if name not in trust.dropped_cases]
    if not kept:
        raise DatasetError(f"the filter dropped every {what} case; run ukbob_filter with a milder policy")
    cases = tuple(TrainingCase(name, case_lookup(trust, name, scheme)) for name in kept)
    flagged = sum(len(trust.flagged_values(name)) for name in kept)
    log.info(
        "label filter (%s): %d %s labels flagged in %d cases, %d cases dropped",
        trust.action, flagged, what, sum(case.lookup is not None for case in cases), len(names) - len(kept),
    )  # fmt: skip
    return cases


def _safe_mirror_axes(axes: Sequence[int], scheme: LabelScheme, left_right_axis: int | None) -> tuple[int, ...]:
    """Axes that may be flipped; none when there are left/right labels but no telling which axis swaps them."""
    if left_right_pairs(scheme.names) and left_right_axis is None and axes:
        log.warning("labels name left and right, but the cases' orientations differ: no flips in training")
        return ()
    return tuple(axes)


def label_swap(scheme: LabelScheme) -> Tensor | None:
    """Table that exchanges left and right label indices, or None without such labels.

    Regions are swapped through their member values, when each pair of regions has as many members on both sides.
    """
    pairs = left_right_pairs(scheme.names)
    if not pairs:
        return None
    index_of = {value: k for k, value in enumerate(scheme.values, start=1)}
    table = np.arange(int(np.iinfo(scheme.dtype).max) + 1)
    for left, right in pairs:
        one, other = scheme.members[left], scheme.members[right]
        if len(one) == len(other):
            for a, b in zip(one, other, strict=True):
                table[index_of[a]], table[index_of[b]] = index_of[b], index_of[a]
    return torch.from_numpy(table)


def output_swap(scheme: LabelScheme) -> tuple[int, ...] | None:
    """Order of network outputs that exchanges left and right, or None without such labels."""
    pairs = left_right_pairs(scheme.output_names)
    if not pairs:
        return None
    order = list(range(scheme.num_outputs))
    for left, right in pairs:
        order[left], order[right] = right, left
    return tuple(order)


def make_loss(setup: TrainingSetup) -> Callable[[Tensor | Sequence[Tensor], Tensor], Tensor]:
    """The loss that fits the head and the labels."""
    scheme = setup.spec.labels
    if setup.description.head == "softmax":
        return with_deep_supervision(SoftmaxDiceLoss(scheme.ignore_index))
    if scheme.has_regions:
        table, skip = torch.from_numpy(scheme.region_table), False
    else:
        table, skip = torch.eye(scheme.num_outputs, dtype=torch.bool), True
    return with_deep_supervision(SigmoidDiceLoss(table, scheme.ignore_index, skip_background=skip))


def make_augmentation(setup: TrainingSetup, config: TrainingConfig, left_right_axis: int | None) -> list[Transform]:
    """The transforms of the recipe."""
    return make_transforms(
        config.augmentation,
        AugmentationSetup(
            patch_size=setup.network.patch_size,
            spacing_mm=setup.configuration.spacing_mm,
            mirror_axes=setup.description.mirror_axes,
            left_right_axis=left_right_axis,
            swap=label_swap(setup.spec.labels),
            channels=len(setup.spec.channel_names),
        ),
    )


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with the paper's betas, or nnU-Net's SGD."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=0.99, nesterov=True, weight_decay=config.weight_decay
        )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay
        )
    raise ConfigError(f"unknown optimizer {config.optimizer!r}")
