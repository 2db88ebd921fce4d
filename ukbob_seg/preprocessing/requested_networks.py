"""Networks that are planned when they are asked for: by ``ukbob_plan --networks``, or in ``ukbob_train --network``.

plans.json lists Swin-UNETR and nnU-Net's U-Net, which most people want. Any other network that has a planner is planned
from the same fingerprint under the same budget: the same inputs always give the same plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ukbob_seg.dataset.spec import DatasetSpec
from ukbob_seg.errors import ConfigError
from ukbob_seg.preprocessing.baseline_plans import BASELINE_PLANNERS
from ukbob_seg.preprocessing.fingerprint import Fingerprint
from ukbob_seg.preprocessing.network_plans import NETWORK_PLANNERS, PlanningInput, plan_residual_unet
from ukbob_seg.preprocessing.nnunet_rules import SIZINGS
from ukbob_seg.preprocessing.plan_options import PlanOptions, planning_input
from ukbob_seg.preprocessing.plans import ConfigurationPlan, NetworkPlan, Plans

log = logging.getLogger(__name__)

RESIDUAL = ("residual_encoder_unet", "resenc_unet_m", "resenc_unet_l", "resenc_unet_xl")
PLANNERS: dict[str, Callable[[PlanningInput], tuple[NetworkPlan, str]]] = {
    **NETWORK_PLANNERS,
    **{name: partial(plan_residual_unet, name) for name in RESIDUAL},
    **BASELINE_PLANNERS,
}
IN_SLICES = ("plain_conv_unet", *RESIDUAL)  # networks that exist in 2D as well


def with_networks(plans: Plans, fingerprint: Fingerprint, spec: DatasetSpec, options: PlanOptions) -> Plans:
    """The plans with ``options.networks`` in every configuration that can have them.

    Raises:
        ConfigError: a network that no planner knows, or that cannot take the data.
    """
    for network in options.networks:
        _check_known(network)
        for name, configuration in plans.configurations.items():
            if network not in configuration.networks and _fits(plans, configuration, network):
                plans = _added(plans, fingerprint, spec, name, network, options)
    return plans


def with_network(plans: Plans, fingerprint: Fingerprint, spec: DatasetSpec, configuration: str, network: str) -> Plans:
    """The plans, with a network that one configuration lacks planned as ``ukbob_plan`` would have done.

    Args:
        plans: of the dataset.
        fingerprint: that they were made from.
        spec: the dataset's contract.
        configuration: of the plans.
        network: name; one that the configuration has already leaves the plans as they are.

    Raises:
        ConfigError: no such configuration; neither planned nor known to a planner; or it cannot take the data.
    """
    entry = plans.configuration(configuration)
    if network in entry.networks:
        return plans
    if network not in PLANNERS or not _fits(plans, entry, network):
        if network in BASELINE_PLANNERS or network == "swin_unetr":
            raise ConfigError(f"{network} is a 3D network, and {configuration} is of slices; give a 3D configuration")
        raise ConfigError(
            f"the plans hold no network {network!r} for {configuration} (found: {', '.join(entry.networks)}), and none "
            f"of this name can be planned (those are: {', '.join(PLANNERS)}); choose one of those, or add it to "
            "plans.json"
        )
    options = PlanOptions(memory_gb=plans.memory_gb, preset=plans.preset)
    return _added(plans, fingerprint, spec, configuration, network, options)


def load_plans(folder: Path, configuration: str, network: str) -> Plans:
    """The plans of a preprocessed dataset, with a network that plans.json may lack (``with_network``).

    Nothing is written: the file stays what the user made of it, and two trainings at once cannot spoil it.

    Raises:
        ConfigError: no plans, no such configuration, or a network that cannot be planned.
    """
    plans = Plans.load(folder / "plans.json")
    if network in plans.configuration(configuration).networks:
        return plans
    spec = DatasetSpec.from_json(DatasetSpec.load(folder).content, folder.name)
    found = with_network(plans, Fingerprint.load(folder / "fingerprint.json"), spec, configuration, network)
    log.info("not in plans.json, so planned now: %s", found.reasons[-1])
    return found


def _check_known(network: str) -> None:
    if network not in PLANNERS:
        raise ConfigError(
            f"--networks: no planner for {network!r}; choose from {', '.join(PLANNERS)}, or add the network to "
            "plans.json by hand"
        )


def _fits(plans: Plans, configuration: ConfigurationPlan, network: str) -> bool:
    """Whether a configuration may have a network.

    With preset ``nnunet`` its own planners have said which networks each configuration is for.
    """
    if plans.preset == "nnunet" and network in SIZINGS:
        return False
    return configuration.slice_axis is None or network in IN_SLICES


def _added(
    plans: Plans, fingerprint: Fingerprint, spec: DatasetSpec, name: str, network: str, options: PlanOptions
) -> Plans:
    configuration = plans.configurations[name]
    given = planning_input(fingerprint, spec, options, configuration.spacing_mm, configuration.slice_axis)
    if configuration.previous_stage is not None:
        given = replace(given, previous_labels=len(spec.labels.values))
    plan, why = PLANNERS[network](given)
    changed = replace(configuration, networks={**configuration.networks, network: plan})
    configurations = {**plans.configurations, name: changed}
    return replace(plans, configurations=configurations, reasons=(*plans.reasons, f"{name}, {network}: {why}"))
