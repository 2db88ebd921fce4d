"""ukbob_label: label a cohort with a trained model and write it as a raw dataset."""

from __future__ import annotations

import argparse
from pathlib import Path

from ukbob_seg.allocator import reuse_freed_memory
from ukbob_seg.cli.common import add_cluster, choose_device, command, make_parser
from ukbob_seg.cli.models import adaptation, add_adaptation, add_windows, hint_at_precision
from ukbob_seg.errors import ConfigError


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    arguments = _parser().parse_args(argv)
    etta = adaptation(arguments, arguments.etta, "--etta")
    if arguments.no_mirror and not arguments.tta:
        print("--no-mirror: nothing is flipped without --tta in any case")

    reuse_freed_memory()
    from ukbob_seg.inference.settings import PredictionSettings
    from ukbob_seg.labelling.label import label_cohort
    from ukbob_seg.labelling.options import LabelOptions
    from ukbob_seg.labelling.outputs import TABLE
    from ukbob_seg.parallel import Cluster, Part, check_workers

    check_workers(arguments.workers)
    settings = PredictionSettings(
        step=arguments.step_size,
        tta=arguments.tta,
        mirror=not arguments.no_mirror,
        etta=etta if arguments.etta else None,
        window_batch=arguments.window_batch,
        skip_empty=arguments.skip_empty,
        precision=arguments.precision,
        overlap=not arguments.no_overlap,
    )
    part = None if arguments.part is None else Part.parse(arguments.part)
    options = LabelOptions(
        model=arguments.model,
        folds=_tuple(arguments.folds),
        checkpoint=arguments.checkpoint,
        devices=_devices(arguments.device, arguments.scheduler is not None),
        settings=settings,
        channel=_tuple(arguments.channel),
        fuse=_tuple(arguments.fuse),
        roi_model=arguments.roi_model,
        channel_names=_tuple(arguments.channel_names),
        names=arguments.names,
        copy=arguments.copy,
        overwrite=arguments.overwrite,
        skip_failed=arguments.skip_failed,
        workers=arguments.workers,
        cluster=Cluster(arguments.scheduler, part),
    )
    if arguments.scheduler is None and not arguments.output.exists():
        hint_at_precision(arguments, ", ".join(options.devices))
    output = label_cohort(arguments.input, arguments.output, options)
    share = "" if part is None else f"part {part.number} of {part.total}: "
    print(f"{share}{output} is labelled; warnings and problems, if any, are in {output / TABLE}")


def _devices(name: str, is_elsewhere: bool) -> tuple[str, ...]:
    """``auto`` is every CUDA device, or the CPU; Dask workers look for what they have themselves."""
    if is_elsewhere:
        if name not in ("auto", "cpu", "cuda", "mps") and not name.removeprefix("cuda:").isdigit():
            raise ConfigError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
        return (name,)
    chosen = choose_device(name)
    if name != "auto" or chosen != "cuda":
        return (chosen,)
    import torch

    count = torch.cuda.device_count()
    return tuple(f"cuda:{number}" for number in range(count)) if count > 1 else ("cuda",)


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_label",
        "Label a cohort with a trained model (ours or nnU-Net v2's, such as TotalVibeSegmentator) and write images and "
        "label maps as a raw dataset, ready for ukbob_filter. The same command goes on where it was interrupted.",
        "  ukbob_label --model Dataset080_model.zip --input cohort --output ukbob_data/raw/Dataset072_UKBOB "
        "--channel water\n"
        "  ukbob_label --model MODEL_FOLDER --input cohort --output ukbob_data/raw/Dataset072_UKBOB "
        "--fuse water inphase outphase\n"
        "  ukbob_label --model MODEL_FOLDER --input cohort --output OUT --part $SLURM_ARRAY_TASK_ID/16",
    )
    parser.add_argument(
        "-m", "--model", type=Path, required=True, metavar="DIR", help="model folder, or archive of nnU-Net"
    )
    parser.add_argument(
        "-i", "--input", type=Path, required=True, metavar="DIR", help="raw dataset, or folder of CASE_0000.ext files"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="dataset folder, DatasetXXX_Name"
    )
    parser.add_argument("-f", "--folds", nargs="+", metavar="FOLD", help="folds to average (default: all trained)")
    parser.add_argument("--checkpoint", choices=("best", "final"), help="default: best; of nnU-Net final")
    parser.add_argument(
        "--device", default="auto",
        help="auto (default: all CUDA devices, or cpu), cpu, cuda, cuda:1; of each Dask worker with --scheduler",
    )  # fmt: skip
    channels = parser.add_argument_group("channels")
    channels.add_argument(
        "--channel", nargs="+", metavar="NAME", help="channels of the cohort, by name or number, that the model takes"
    )
    channels.add_argument(
        "--fuse", nargs="+", metavar="NAME",
        help="label these channels one by one and merge the label maps by priority of the structures",
    )  # fmt: skip
    channels.add_argument(
        "--roi-model", type=Path, metavar="DIR",
        help="model folder or archive of TotalVibeSegmentator's ROI model (278), whose label map its first releases "
        "take beside the image",
    )  # fmt: skip
    channels.add_argument(
        "--channel-names", nargs="+", metavar="NAME", help="of the cohort (default: those of its dataset.json)"
    )
    parser.add_argument(
        "--names", choices=("auto", "model", "totalvibe"), default="auto",
        help="names of the labels (default auto: TotalVibeSegmentator's for a model of its values, else the model's)",
    )  # fmt: skip
    parser.add_argument("--copy", action="store_true", help="copy images instead of linking them")
    parser.add_argument("--overwrite", action="store_true", help="replace labels that were made otherwise")
    parser.add_argument(
        "--skip-failed", action="store_true",
        help="leave out cases that cannot be labelled instead of failing at the end; see labelling.csv",
    )  # fmt: skip
    parser.add_argument("--etta", action="store_true", help="adapt normalization layers to each case")
    add_adaptation(parser)
    parser.add_argument("--tta", action="store_true", help="average over flips along the axes that training mirrored")
    add_windows(parser)
    parser.add_argument("--no-overlap", action="store_true", help="one case in memory instead of two, slower")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes on a CPU (default: one, which uses all processors)"
    )
    add_cluster(parser, "all parts may have the same output folder")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(None))
