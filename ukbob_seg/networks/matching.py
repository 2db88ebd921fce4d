"""Fitting the two ends of pretrained weights to other data: output rows by class, input channels by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ukbob_seg.errors import CheckpointError
from ukbob_seg.networks.pretrained import Interface, plain_name


def match_rows(count: int, have: Interface | None, want: Interface) -> list[int | None]:
    """From which pretrained row each output starts; None where it starts fresh.

    Without the names of the pretrained rows, all are taken as they come when there are as many as wanted.

    Args:
        count: rows of the pretrained layer.
        have: what is known of the pretrained network.
        want: of the network to be filled.

    Raises:
        CheckpointError: the names do not fit so many rows.
    """
    if have is None:
        return list(range(count)) if count == len(want.outputs) else [None] * len(want.outputs)
    names = have.rows(count)
    return [_find(name, names) for name in want.outputs]


def pick_rows(given: Tensor, fresh: Tensor, dim: int, rows: Sequence[int | None]) -> Tensor:
    """``fresh`` with the rows of ``given`` that have a partner, along ``dim``."""
    result = fresh.clone()
    for row, source in enumerate(rows):
        if source is not None:
            result.select(dim, row).copy_(given.select(dim, source))
    return result


def fit_channels(given: Tensor, dim: int, have: Interface | None, want: Interface) -> tuple[Tensor, dict[str, str]]:
    """Weights for the wanted input channels.

    - A channel with a pretrained one of the same name gets its slice.
    - The other image channels share what the pretrained ones without partner gave: each gets their sum, divided by the
      number of sharers. So an image repeated in all channels gives the activation that it gave before. Where every
      pretrained channel has found its partner, new channels start at zero, and the network computes what it did.
    - As many image channels, none of a known name: channel by channel.
    - Maps of a first stage's labels start at zero, unless the pretrained network has the same.

    Args:
        given: pretrained weight.
        dim: of the input channels.
        have: what is known of the pretrained network; all its channels are images where nothing is.
        want: of the network to be filled.

    Returns:
        The weight, and for each channel what it starts from.

    Raises:
        CheckpointError: the names do not fit the number of channels.
    """
    count, previous = given.shape[dim], () if have is None else have.previous
    images = count - len(previous)
    if have is not None and images != len(have.inputs):
        raise CheckpointError(
            f"the pretrained network has {images} input channels, its dataset.json names {len(have.inputs)}; give the "
            "dataset.json that it was trained with"
        )
    names: tuple[str | None, ...] = have.inputs if have is not None else (None,) * images
    found = [_find(name, names) for name in want.inputs]
    if images == len(want.inputs) and all(source is None for source in found):
        found = list(range(images))
    left = [k for k in range(images) if k not in found]
    sharers = found.count(None)
    shared = given.index_select(dim, torch.tensor(left, dtype=torch.long)).sum(dim) / max(sharers, 1)
    slices, origin = [], {}
    for name, source in zip(want.inputs, found, strict=True):
        slices.append(shared if source is None else given.select(dim, source))
        text = f"channel {source}" if source is not None else "zero" if not left else (
            f"sum of channels {', '.join(map(str, left))}" + (f" / {sharers}" if sharers > 1 else ""))  # fmt: skip
        origin[name] = f"{text} ({names[source]})" if source is not None and names[source] else text
    for label in want.previous:
        source = _find(label, previous)
        slices.append(torch.zeros_like(shared) if source is None else given.select(dim, images + source))
        origin[f"first stage: {label}"] = "zero" if source is None else f"first stage: {previous[source]}"
    return torch.stack(slices, dim=dim), origin


def _find(name: str, names: Sequence[str | None]) -> int | None:
    """Position of a name: the exact one, else the only one that differs in case, spaces or underscores."""
    if name in names:
        return names.index(name)
    alike = [k for k, other in enumerate(names) if other is not None and plain_name(other) == plain_name(name)]
    return alike[0] if len(alike) == 1 else None
