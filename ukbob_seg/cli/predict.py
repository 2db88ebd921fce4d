"""ukbob_predict: segment a folder of images or a single file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ukbob_seg.allocator import reuse_freed_memory
from ukbob_seg.cli.common import add_roots, choose_device, command, make_parser, roots_from
from ukbob_seg.cli.models import (
    ONE_MODEL,
    adaptation,
    add_adaptation,
    add_model,
    add_postprocessing,
    add_windows,
    hint_at_precision,
    largest_components,
    model_folders,
)


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.model is None) == (arguments.dataset is None):
        parser.error(ONE_MODEL)
    roots = roots_from(arguments)
    etta = adaptation(arguments, arguments.etta, "--etta")
    if arguments.no_mirror and not arguments.tta:
        print("--no-mirror: nothing is flipped without --tta in any case")

    reuse_freed_memory()
    from ukbob_seg.inference.ensemble_predictor import load_predictor
    from ukbob_seg.inference.predict import predict
    from ukbob_seg.inference.settings import PredictionSettings
    from ukbob_seg.parallel import Part

    settings = PredictionSettings(
        step=arguments.step_size,
        tta=arguments.tta,
        mirror=not arguments.no_mirror,
        etta=etta if arguments.etta else None,
        window_batch=arguments.window_batch,
        skip_empty=arguments.skip_empty,
        precision=arguments.precision,
        postprocessing=not arguments.no_postprocessing,
        largest_component=largest_components(arguments),
        overlap=not arguments.no_overlap,
        compile=arguments.compile,
        classes=None if arguments.classes is None else tuple(arguments.classes),
        save_probabilities=arguments.save_probabilities,
        statistics=arguments.statistics,
        preview=arguments.preview,
        save_entropy=arguments.save_entropy,
    )
    part = None if arguments.part is None else Part.parse(arguments.part)
    folders = model_folders(arguments, roots)
    arguments.model = arguments.model and ", ".join(map(str, arguments.model))  # for predict_args.json
    # All parts write the same file.
    recorded = {key: str(value) for key, value in sorted(vars(arguments).items()) if key != "part"}
    device = choose_device(arguments.device)
    hint_at_precision(arguments, device)
    with load_predictor(folders, arguments.folds, arguments.checkpoint, device, settings) as predictor:
        try:
            written = predict(
                predictor, arguments.input, arguments.output, resume=arguments.resume, part=part, arguments=recorded,
                dicom_seg=arguments.dicom_seg,
            )  # fmt: skip
        except KeyboardInterrupt as interrupt:
            again = "interrupted; finished cases are kept, run the same command with --resume to go on"
            raise KeyboardInterrupt(again) from interrupt
    share = "" if part is None else f"part {part.number} of {part.total}: "
    print(f"{share}{len(written)} cases -> {arguments.output}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_predict",
        "Segment images with a trained model; label maps are written at the geometry of the input files. With --etta "
        "the normalization layers adapt to each case first (entropy test-time adaptation).",
        "  ukbob_predict -i imagesTs -o predictions -d 4 -f 0 --etta\n"
        "  ukbob_predict -i scan_0000.nii.gz -o scan_labels.nii.gz -m results/Dataset004_X/3d_fullres__swin_unetr\n"
        "  ukbob_predict -i imagesTs -o predictions -m results/Dataset004_X/3d_fullres__swin_unetr "
        "-m results/Dataset004_X/2d__swin_unetr\n"
        "  ukbob_predict -i imagesTs -o predictions -m nnUNetTrainer__nnUNetPlans__3d_fullres --tta\n"
        "  ukbob_predict -i imagesTs -o predictions -d 4 --classes liver spleen --statistics --preview\n"
        "  ukbob_predict -i imagesTs -o predictions -d 4 --part $SLURM_ARRAY_TASK_ID/16 --resume    # in a job array",
    )
    parser.add_argument(
        "-i",
        "--input",
        type=Path,
        required=True,
        help="folder of CASE_0000.ext files, one file, or a folder of DICOM files, one folder for each case",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder, or a label file for one input file")
    add_model(parser)
    parser.set_defaults(checkpoint=None)  # best; of a model of nnU-Net final
    _add_ways(parser)
    _add_outputs(parser)
    add_roots(parser, "results")
    return parser


def _add_ways(parser: argparse.ArgumentParser) -> None:
    """How cases are predicted."""
    parser.add_argument("--etta", action="store_true", help="adapt normalization layers to each case")
    add_adaptation(parser)
    parser.add_argument(
        "--tta",
        action="store_true",
        help="average over flips along the axes that training mirrored, and over small changes of intensity",
    )
    add_windows(parser)
    add_postprocessing(parser)
    parser.add_argument(
        "--no-overlap", action="store_true",
        help="do not read the next case while the network works on another: less memory, slower",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the network, for many cases; as it is where that fails"
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    """What is written, of which cases."""
    written = parser.add_argument_group("what is written, beside CASE.ext")
    written.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="only these classes of dataset.json, with the values that they always have; the others become background "
        "(default: all)",
    )
    written.add_argument(
        "--statistics",
        action="store_true",
        help="also CASE_statistics.json: voxels, volume in ml, mean and sd of the image's intensity, of each class",
    )
    written.add_argument(
        "--preview",
        action="store_true",
        help="also CASE_preview.png: axial, coronal and sagittal slices with the outlines of the classes",
    )
    written.add_argument(
        "--save-probabilities", action="store_true", help="also CASE_probabilities.b2nd (float16), of all classes"
    )
    written.add_argument(
        "--save-entropy", action="store_true",
        help="also CASE_entropy: how uncertain the prediction of each voxel is, in nats (float32)",
    )  # fmt: skip
    written.add_argument(
        "--dicom-seg", action="store_true",
        help="also CASE_seg.dcm: a DICOM Segmentation that refers to the series, where cases are DICOM series",
    )  # fmt: skip
    cases = parser.add_argument_group("which cases")
    cases.add_argument(
        "--part",
        metavar="I/N",
        help="only part I of N of the cases (I from 1), for job arrays; all parts may have the same output folder",
    )
    cases.add_argument(
        "--resume", action="store_true",
        help="leave cases alone whose label file exists; options have to be those of the run that wrote it",
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main(None))
