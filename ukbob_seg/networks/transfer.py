"""Copying given weights into a network: by name and shape, output rows by class, input channels by channel name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ukbob_seg.errors import CheckpointError
from ukbob_seg.networks.matching import fit_channels, match_rows, pick_rows
from ukbob_seg.networks.pretrained import Interface, Pretrained
from ukbob_seg.networks.wrappers import unwrapped

MORE_INPUTS, MORE_OUTPUTS = 1, 2  # by which a network is enlarged to see what depends on its ends
LEAST_SHARE = 0.1  # of the network's weights; below, something is probably wrong

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass
class TransferReport:
    """What happened to each weight, by the network's own names (``unused``: by the checkpoint's).

    Attributes:
        source: where the weights came from.
        loaded: copied as they are.
        mapped: output weights whose rows were taken class by class.
        rows: for each output, the pretrained class that it starts from, or None for a fresh start.
        inflated: input weights whose channels were taken one by one.
        channels: for each input channel, what it starts from.
        identity: weights and biases of norms that the checkpoint has without: 1 and 0.
        fresh: not in the checkpoint.
        not_fitting: fresh although the checkpoint has them, and why: another shape, or no class in common.
        unused: in the checkpoint only.
        share: of the network's numbers that come from the checkpoint, 0 to 1.
        warnings: sentences.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)
    rows: dict[str, str | None] = field(default_factory=dict)
    inflated: list[str] = field(default_factory=list)
    channels: dict[str, str] = field(default_factory=dict)
    identity: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    not_fitting: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    share: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line."""
        parts = [f"{len(self.loaded)} weights loaded as they are"]
        if self.mapped:
            kept = [name for name, row in self.rows.items() if row is not None]
            lacking = [name for name, row in self.rows.items() if row is None]
            parts.append(f"{len(self.mapped)} output weights keep {len(kept)} of {len(self.rows)} classes")
            if lacking:
                parts[-1] += f" (fresh: {_few(lacking)})"
        if self.inflated:
            origins = [f"{name} from {origin}" for name, origin in self.channels.items()]
            parts.append(f"{len(self.inflated)} input weights fitted to other channels ({_few(origins)})")
        if self.identity:
            parts.append(f"{len(self.identity)} norm weights start as identity")
        for what, names in (("fresh", self.fresh), ("not fitting", list(self.not_fitting)),
                            ("of the checkpoint unused", self.unused)):  # fmt: skip
            parts.append(f"{len(names)} {what}" + (f" ({_few(names)})" if names else ""))
        share = math.floor(1000 * self.share) / 10  # 100.0 only where nothing is fresh
        return f"pretrained weights {self.source}: {'; '.join(parts)}; {share}% of the network's values are theirs"

    def to_json(self) -> dict[str, Any]:
        """Plain values: the counts first, then every name."""
        listing = {key: value for key, value in self.__dict__.items() if isinstance(value, (list, dict))}
        counts = {key: len(value) for key, value in listing.items() if key not in ("rows", "channels", "warnings")}
        return {"source": self.source, "share": round(self.share, 6), "counts": counts, **listing}


@dataclass(frozen=True)
class _Ends:
    """Dimensions of a weight that grow with the inputs and the outputs; ``unclear`` when others grow, or by more."""

    inputs: int | None = None
    outputs: int | None = None
    unclear: bool = False


def transfer(
    network: nn.Module, pretrained: Pretrained, interface: Interface, build_larger: Callable[[int, int], nn.Module]
) -> TransferReport:
    """Start a network from given weights, in place.

    Args:
        network: with fresh weights, wrapped or not.
        pretrained: the given weights.
        interface: of the network.
        build_larger: builds the same network with so many more input channels and outputs. The dimensions that grow
            are those of channels and classes, in whatever network.

    Raises:
        CheckpointError: not a single weight matches, or a matching one holds NaN.
    """
    inner = unwrapped(network)
    wanted = inner.state_dict()
    given = pretrained.renamed(wanted.keys())
    report = TransferReport(pretrained.source)
    ends = _find_ends(wanted, build_larger, report)
    result: dict[str, Tensor] = {}
    for name in sorted(wanted.keys() & given.keys()):
        fitter = _Fitter(pretrained.interface, interface, report)
        value = fitter.fit(name, given[name], wanted[name].cpu(), ends.get(name, _Ends()))
        if value is not None and not torch.isfinite(value).all():
            raise CheckpointError(f"{pretrained.source} is damaged: {name} holds NaN or infinite numbers")
        if value is not None:
            result[name] = value
    if not any(value.is_floating_point() for value in result.values()):
        of = f" (a checkpoint of {pretrained.network})" if pretrained.network else ""
        raise CheckpointError(
            f"{pretrained.source}{of}: not one of its {len(given)} weights matches this network; is it of another "
            "architecture or size?"
        )
    report.unused = sorted(given.keys() - wanted.keys())
    absent = wanted.keys() - given.keys()
    identity = _identity_norms(inner, absent, result.keys())
    report.identity, report.fresh = sorted(identity), sorted(absent - identity.keys())
    inner.load_state_dict({**result, **identity}, strict=False)
    report.share = _share(wanted, result, report)
    has_outputs = any(name in given and end.outputs is not None for name, end in ends.items())
    report.warnings += _warnings(report, pretrained, interface, inner, has_outputs)
    return report


def _find_ends(
    wanted: Mapping[str, Tensor], build_larger: Callable[[int, int], nn.Module], report: TransferReport
) -> dict[str, _Ends]:
    """What of each weight depends on the numbers of inputs and outputs, found by building the network with more."""
    try:
        larger = unwrapped(build_larger(MORE_INPUTS, MORE_OUTPUTS)).state_dict()
    except Exception as error:  # a user's own class may take certain numbers only, and say so in any way
        report.warnings.append(
            f"weights were matched by name and shape only: the network cannot be built with other channels ({error})"
        )
        return {}
    ends = {}
    for name in wanted.keys() & larger.keys():
        before, after = wanted[name].shape, larger[name].shape
        steps = [b - a for a, b in zip(before, after, strict=True)] if len(before) == len(after) else [-1]
        grown = [step for step in steps if step]
        if sorted(grown) in ([MORE_INPUTS], [MORE_OUTPUTS], [MORE_INPUTS, MORE_OUTPUTS]):
            place = {step: dim for dim, step in enumerate(steps) if step}
            ends[name] = _Ends(place.get(MORE_INPUTS), place.get(MORE_OUTPUTS))
        elif grown:
            ends[name] = _Ends(unclear=True)
    return ends


@dataclass(frozen=True)
class _Fitter:
    """Brings a weight into the form wanted, and notes how in the report."""

    have: Interface | None
    want: Interface
    report: TransferReport

    def fit(self, name: str, given: Tensor, fresh: Tensor, ends: _Ends) -> Tensor | None:
        """The weight, or None where it must start fresh."""
        shapes = f"{tuple(given.shape)} in the checkpoint, {tuple(fresh.shape)} here"
        fixed = [dim for dim in range(fresh.dim()) if dim not in (ends.inputs, ends.outputs)]
        if given.dim() != fresh.dim() or any(given.shape[dim] != fresh.shape[dim] for dim in fixed):
            self.report.not_fitting[name] = shapes
            return None
        if ends.unclear and self.have is not None and self.have.outputs != self.want.outputs:
            self.report.not_fitting[name] = "its rows cannot be told apart, and the classes differ"
            return None
        lists = []
        if ends.inputs is not None:
            fitted, origin = fit_channels(given, ends.inputs, self.have, self.want)
            if fitted.shape != given.shape or not torch.equal(fitted, given):
                self.report.channels.update(origin)
                lists.append(self.report.inflated)
            given = fitted
        if ends.outputs is not None:
            count = given.shape[ends.outputs]
            rows = match_rows(count, self.have, self.want)
            if all(row is None for row in rows):
                self.report.not_fitting[name] = shapes if self.have is None else "no class in common"
                return None
            if rows != list(range(count)):
                names = [] if self.have is None else self.have.rows(count)
                pairs = zip(self.want.outputs, rows, strict=True)
                self.report.rows.update({want: None if row is None else names[row] for want, row in pairs})
                lists.append(self.report.mapped)
                given = pick_rows(given, fresh, ends.outputs, rows)
        for names_of_kind in lists or [self.report.loaded]:
            names_of_kind.append(name)
        return given


def _identity_norms(network: nn.Module, absent: Set[str], loaded: Set[str]) -> dict[str, Tensor]:
    """Weight 1 and bias 0 of norms without either in the checkpoint, where it fills the layers around them."""
    result = {}
    for path, module in network.named_modules(remove_duplicate=False):  # some weights have several names
        if not isinstance(module, _NORMS):
            continue
        around = path[: path.rfind(".") + 1]
        for kind, start in (("weight", 1.0), ("bias", 0.0)):
            value = getattr(module, kind, None)
            if value is not None and f"{path}.{kind}" in absent and any(name.startswith(around) for name in loaded):
                result[f"{path}.{kind}"] = torch.full_like(value, start).detach().cpu()
    return result


def _share(wanted: Mapping[str, Tensor], result: Mapping[str, Tensor], report: TransferReport) -> float:
    """Share of the network's numbers that come from the checkpoint; a weight of several names counts once."""
    kept = sum(row is not None for row in report.rows.values()) / max(len(report.rows), 1)
    sizes = {value.data_ptr(): (value.numel(), name) for name, value in wanted.items() if value.is_floating_point()}
    taken = sum(n * (kept if name in report.mapped else 1) for n, name in sizes.values() if name in result)
    return taken / max(sum(n for n, _ in sizes.values()), 1)


def _warnings(
    report: TransferReport, pretrained: Pretrained, interface: Interface, network: nn.Module, has_outputs: bool
) -> Iterator[str]:
    have = pretrained.interface
    if report.share < LEAST_SHARE:
        yield (
            f"only {report.share:.1%} of the network come from {pretrained.source}; is it of another architecture or "
            "size?"
        )
    if have is None and has_outputs:
        yield (
            f"{pretrained.source} does not say what its classes are: output rows are kept, in their order, only where "
            "there are as many as here; --pretrained-dataset dataset.json maps them by name"
        )
    other_head = have is not None and have.head not in (None, interface.head)
    if have is not None and other_head and (report.mapped or have.outputs == interface.outputs):
        yield (
            f"the output rows were trained with a {have.head} head, this run has a {interface.head} head: they are "
            "kept, but their logits mean something else"
        )
    modules = network.named_modules(remove_duplicate=False)
    norms = {path for path, module in modules if isinstance(module, _NORMS)}
    lost = [name for name in report.unused if name.rpartition(".")[0] in norms]
    if lost:
        yield (
            f"{len(lost)} weights of norms ({_few(lost)}) have no place here, and the network will not compute what it "
            'did; plans.json may say "norm_affine": true in its arguments'
        )


def _few(names: Sequence[str], most: int = 3) -> str:
    more = f", ... and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
