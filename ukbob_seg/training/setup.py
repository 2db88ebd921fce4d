"""Everything a training run needs, gathered and checked before the first step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.paths import Roots, find_dataset
from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError, DatasetError
from ukbob_seg.files import read_json
from ukbob_seg.filtering.policies import LabelTrust, case_lookup, flagged_indices
from ukbob_seg.networks.diffusion import DiffusionNetwork
from ukbob_seg.networks.registry import check_patch
from ukbob_seg.networks.wrappers import unwrapped
from ukbob_seg.preprocessing.fingerprint import Fingerprint
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans
from ukbob_seg.preprocessing.preprocessor import arrays_folder, preprocessing_recipe
from ukbob_seg.preprocessing.records import load_record
from ukbob_seg.preprocessing.requested_networks import load_plans
from ukbob_seg.training.augmentation import AugmentationSetup, Transform, make_transforms
from ukbob_seg.training.cascade import previous_stage_maps
from ukbob_seg.training.checkpoint import ModelDescription
from ukbob_seg.training.config import TrainingConfig, recipe
from ukbob_seg.training.distributed import is_first
from ukbob_seg.training.flags import FlagCodes, with_flag_codes
from ukbob_seg.training.left_right import label_swap, safe_mirror_axes
from ukbob_seg.training.losses import SigmoidDiceLoss, SoftmaxDiceLoss, with_deep_supervision
from ukbob_seg.training.noise_loss import NoiseLoss
from ukbob_seg.training.sampling import TrainingCase
from ukbob_seg.training.splits import Split, choose_split, load_groups, load_or_make_splits, take_subset
from ukbob_seg.training.usual_fields import usual_fields

log = logging.getLogger(__name__)

DESCRIPTION = "training.json"


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
        flag_codes: with a marginal loss, what stands for flagged organs in the labels of ``train``.
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
    flag_codes: FlagCodes | None = None


def default_network(dataset: int | str, roots: Roots, configuration: str) -> str:
    """The network that a configuration is trained with unless another is named."""
    plans = Plans.load(find_dataset(roots.preprocessed, dataset) / "plans.json")
    return plans.configuration(configuration).default_network


def recorded_config(
    dataset: int | str, folds: Sequence[str], roots: Roots, configuration: str, network: str
) -> TrainingConfig | None:
    """The recipe that the first of these folds was begun with; None when none was.

    Raises:
        ConfigError, DatasetError: its training.json cannot be read.
    """
    folder = model_folder(roots, find_dataset(roots.preprocessed, dataset).name, configuration, network)
    for fold in folds:
        path = folder / f"fold_{fold}" / DESCRIPTION
        if path.is_file():
            content = read_json(path, "description of the run")
            return TrainingConfig.from_json({k: v for k, v in content.items() if k not in ("cases", "ended")})
    return None


def choose_config(
    dataset: int | str,
    roots: Roots,
    network: str,
    pretrained: bool = False,
    begun: TrainingConfig | None = None,
    **changes: Any,
) -> TrainingConfig:
    """The recipe of the dataset's preset and the network, with the user's changes.

    Args:
        dataset: id or name of a planned dataset.
        roots: folders.
        network: registry name.
        pretrained: whether the run fine-tunes given weights.
        begun: recipe of the run that is resumed, in place of the preset's.
        changes: fields of ``TrainingConfig``; None leaves the recipe's value.
    """
    plans = Plans.load(find_dataset(roots.preprocessed, dataset) / "plans.json")
    given = {key: value for key, value in changes.items() if value is not None}
    base = begun or recipe(network, plans.preset, pretrained)
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
    plans = load_plans(folder, configuration, network)
    spec = DatasetSpec.from_json(DatasetSpec.load(folder).content, folder.name)
    plan = plans.configuration(configuration)
    network_plan = plan.network(network)
    check_patch(network, network_plan.arguments, network_plan.patch_size)
    arrays = arrays_folder(folder, plans, configuration)
    if not any(arrays.glob("*.json")):
        raise DatasetError(
            f"{folder.name} is not preprocessed for {configuration}; run "
            f"ukbob_preprocess -d {dataset} -c {configuration}"
        )
    split, groups = find_split(folder, plans.preset, roots, fold)
    train = take_subset(split.train, config.subset_fraction, config.seed, groups)
    recipe = preprocessing_recipe(plans, plan, spec)
    val = split.val[: config.validation_cases or None]
    _check_arrays(arrays, (*train, *split.val), recipe)
    trust = LabelTrust.load(folder / "solf") if use_filter else None
    if config.flagged_labels == "marginal" and trust is None:
        _refuse_marginal(folder.name, use_filter)
    head = "sigmoid" if spec.labels.has_regions or config.loss == "bce_dice" else "softmax"
    description = ModelDescription(
        network=network,
        arguments=dict(network_plan.arguments),
        configuration=configuration,
        fold=fold,
        head=head,
        mirror_axes=safe_mirror_axes(
            # A patch of one slice looks the same flipped across it, but its labels would be exchanged.
            [a for a in config.mirror_axes if config.augmentation != "none" and a != plan.slice_axis],
            spec.labels,
            plans.left_right_axis,
        ),
        plans=plans.to_json(),
        dataset=spec.content,
    )
    models = model_folder(roots, folder.name, configuration, network)
    previous = None
    if plan.previous_stage is not None:
        first_stage = model_folder(roots, folder.name, plan.previous_stage, network)
        maps = folder / "previous_stage" / f"{first_stage.name}__{arrays.name}"
        previous = previous_stage_maps(first_stage, arrays, maps, (*train, *val), spec)
    trusted, codes = _trusted(train, trust, spec.labels, "training"), None
    if trust is not None and config.flagged_labels == "marginal":
        trusted, codes = _with_codes(trusted, trust, spec.labels)
    checked = _trusted(val, trust, spec.labels, "validation")
    if is_first():  # who writes checkpoints
        fields = usual_fields(arrays, [case.name for case in trusted], plans.normalization)
        description = dataclasses.replace(description, fields=fields)
    return TrainingSetup(
        folder=models / f"fold_{fold}",
        arrays=arrays,
        spec=spec,
        configuration=plan,
        network=network_plan,
        description=description,
        recipe=recipe,
        previous=previous,
        flag_codes=codes,
        train=trusted,
        val=checked,
    )


def model_folder(roots: Roots, dataset: str, configuration: str, network: str) -> Path:
    """``results/DatasetXXX_Name/CONFIG__NETWORK``."""
    return roots.results / dataset / f"{configuration}__{network.replace(':', '.')}"


def find_split(folder: Path, preset: str, roots: Roots, fold: str) -> tuple[Split, dict[str, str]]:
    """The cases of a fold of a preprocessed dataset, and the subject of each case.

    Raises:
        ConfigError: no such fold.
        DatasetError: unusable splits.
    """
    names = [case.name for case in Fingerprint.load(folder / "fingerprint.json").cases]
    groups = load_groups(roots.raw / folder.name / "groups.csv", names)
    scheme = "80-10-10" if preset == "ukbob" else "5-fold"
    splits = None if fold == "all" else load_or_make_splits(folder, names, groups, scheme)
    return choose_split(splits, fold, names), groups


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


def _refuse_marginal(dataset: str, use_filter: bool) -> None:
    """A marginal loss without flags is the plain loss: a contradiction, or something that was forgotten."""
    if not use_filter:
        raise ConfigError("--flagged-labels marginal is about the flags that --no-filter ignores; give one of them")
    log.warning(
        "--flagged-labels marginal has no effect: %s has no flags; run ukbob_filter first where there should be some",
        dataset,
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


def _with_codes(
    cases: Sequence[TrainingCase], trust: LabelTrust, scheme: LabelScheme
) -> tuple[tuple[TrainingCase, ...], FlagCodes | None]:
    """Give cases with flags the tables of a marginal loss instead of those of the policy."""
    if trust.action == "background":
        raise ConfigError(
            "the filter's policy is 'background', which says what flagged voxels are; --flagged-labels marginal leaves "
            "that open: run ukbob_filter with --policy ignore, or drop the option"
        )
    flagged = {case.name: flagged_indices(trust, case.name, scheme) for case in cases}
    if not any(flagged.values()):
        return tuple(cases), None
    codes = FlagCodes.of(flagged.values(), scheme, label_swap(scheme))
    log.info("flagged organs are merged with background in the loss of their case (--flagged-labels marginal)")
    return tuple(
        TrainingCase(case.name, codes.lookup(flagged[case.name])) if flagged[case.name] else case for case in cases
    ), codes


def make_loss(setup: TrainingSetup, network: nn.Module) -> Callable[..., Tensor]:
    """The loss that fits the network, the head, the labels and what flags do."""
    scheme, inner = setup.spec.labels, unwrapped(network)
    weight = inner.cross_entropy_weight if isinstance(inner, DiffusionNetwork) else 1.0
    own: SoftmaxDiceLoss | SigmoidDiceLoss
    if setup.description.head == "softmax":
        own = SoftmaxDiceLoss(scheme.ignore_index, weight)
    elif scheme.has_regions:
        table = torch.from_numpy(scheme.region_table)
        own = SigmoidDiceLoss(table, scheme.ignore_index, entropy_weight=weight)
    else:
        table = torch.eye(scheme.num_outputs, dtype=torch.bool)
        own = SigmoidDiceLoss(table, scheme.ignore_index, skip_background=True, entropy_weight=weight)
    if isinstance(inner, DiffusionNetwork):
        return NoiseLoss(own, inner, setup.flag_codes)
    loss = with_deep_supervision(own)
    return loss if setup.flag_codes is None else with_flag_codes(loss, setup.flag_codes)


def make_augmentation(setup: TrainingSetup, config: TrainingConfig, left_right_axis: int | None) -> list[Transform]:
    """The transforms of the recipe."""
    swap = label_swap(setup.spec.labels)
    if swap is not None and setup.flag_codes is not None:
        swap = setup.flag_codes.extended(swap)
    return make_transforms(
        config.augmentation,
        AugmentationSetup(
            patch_size=setup.network.patch_size,
            spacing_mm=setup.configuration.spacing_mm,
            mirror_axes=setup.description.mirror_axes,
            left_right_axis=left_right_axis,
            swap=swap,
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
