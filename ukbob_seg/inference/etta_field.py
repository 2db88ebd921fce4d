"""Coil fields that the training images do not have are divided out before ETTA adapts anything.

Networks learn what intensities look like; a field that makes one side of the image three times as bright as the other
moves them further than adapted norm layers can follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ukbob_seg.preprocessing.intensity_field import Field, UsualField, find_field
from ukbob_seg.preprocessing.normalization import ChannelNormalization


def remove_fields(
    image: Tensor,
    schemes: Sequence[ChannelNormalization],
    usual: Sequence[UsualField | None],
    least_gain: float,
    least_spread: float,
    margin: float,
) -> tuple[Tensor, tuple[Field | None, ...], tuple[int, ...]]:
    """Bring those channels to the field of the training images whose own is distinctly another.

    Args:
        image: (C, Z, Y, X), normalised; channels beyond ``schemes`` (a previous stage's labels) stay as they are.
        schemes: how the channels were normalised. Only ``zscore`` channels are looked at: the others have a scale of
            their own (CT), on which no coil lays a field.
        usual: the training images' fields in each channel; a channel without is not looked at.
        least_gain: the intensity entropy has to fall by this, in nats.
        least_spread: the logarithm of the field has to differ from the usual one by this (standard deviation).
        margin: and by so many times what the farthest training image does.

    Returns:
        The image (the same tensor where there is nothing to remove), the field of each channel (None for those that are
        not looked at), and the channels that were changed.
    """
    fields: list[Field | None] = [None] * len(schemes)
    changed = {}
    for number, (scheme, expected) in enumerate(zip(schemes, usual, strict=True)):
        if scheme.scheme != "zscore" or expected is None:
            continue
        inside = image[number] != 0 if scheme.mask_nonzero else None
        counted = None if inside is None else inside.cpu().numpy()
        field = find_field(image[number].cpu().numpy(), counted, expected)
        fields[number] = field
        if 0 < field.gain >= least_gain and field.spread(expected) >= max(least_spread, margin * expected.spread):
            changed[number] = flatten(image[number], field, expected, inside)
    if changed:
        image = image.clone()
        for number, channel in changed.items():
            image[number] = channel
    return image, tuple(fields), tuple(changed)


def flatten(channel: Tensor, field: Field, usual: UsualField | None = None, inside: Tensor | None = None) -> Tensor:
    """A channel with the usual field in place of its own, with the mean and standard deviation that it had.

    Args:
        channel: (Z, Y, X), on any device.
        field: of it.
        usual: None for no field at all.
        inside: (Z, Y, X) bool; the other voxels stay as they are, and do not count.
    """
    values = channel.flatten() if inside is None else channel[inside]
    factor = torch.from_numpy(field.logarithm(channel.shape, usual)).exp_().to(channel)
    signal = (values - field.low).clamp_min_(0)
    rest = values - signal  # the lowest intensity, and what lies below it: it would grow with the factor
    flat = signal * (factor.flatten() if inside is None else factor[inside])
    flat.sub_(flat.mean()).mul_(signal.std(correction=0) / flat.std(correction=0).clamp_min(1e-8))
    flat.add_(signal.mean()).add_(rest)
    if inside is None:
        return flat.reshape(channel.shape)
    return channel.masked_scatter(inside, flat)
