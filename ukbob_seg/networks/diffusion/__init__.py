"""Segmentation by denoising diffusion: MedSegDiff v1 and v2 in 3D, with their noise schedule and sampler."""

from ukbob_seg.networks.diffusion.medsegdiff_v1 import MedSegDiffV1
from ukbob_seg.networks.diffusion.medsegdiff_v2 import MedSegDiffV2
from ukbob_seg.networks.diffusion.network import DiffusionNetwork, NoisePrediction, Sampling, set_head, stage_divisor

__all__ = [
    "DiffusionNetwork",
    "MedSegDiffV1",
    "MedSegDiffV2",
    "NoisePrediction",
    "Sampling",
    "set_head",
    "stage_divisor",
]
