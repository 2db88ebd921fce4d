"""ukbob_export_model: a trained model as one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_roots, command, make_parser, roots_from
from ukbob_seg.cli.models import add_trained, model_folders

if TYPE_CHECKING:
    from ukbob_seg.portable.export import Exported


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, export, print."""
    arguments = _parser().parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.portable.export import ExportOptions, export_model

    (folder,) = model_folders(arguments, roots)
    options = ExportOptions(
        checkpoint=arguments.checkpoint,
        licence=arguments.licence,
        citation=arguments.citation,
        onnx=arguments.onnx,
        monai=arguments.monai,
        overwrite=arguments.overwrite,
    )
    bounds = roots.preprocessed / folder.resolve().parent.name / "solf" / "bounds.json"
    try:
        exported = export_model(folder, arguments.output, arguments.folds, options, bounds)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("interrupted; nothing was written") from interrupt
    _print(exported)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "ukbob_export_model",
        "Write a trained model into one zip file: plans, dataset.json, the weights of its folds as safetensors, "
        "postprocessing, bounds of the label filter, a model card, and checksums of all that. Of a cascade the first "
        "stage goes with it. ukbob_import_model makes a model folder of it that predicts the same to the last bit. "
        "Training states and names of cases stay behind.",
        "  ukbob_export_model -d 4 --licence 'CC BY 4.0'\n"
        "  ukbob_export_model -m results/Dataset004_X/3d_fullres__swin_unetr -f 0 1 -o hippocampus.zip\n"
        "  ukbob_export_model -d 4 --onnx --monai",
    )
    parser.add_argument("-d", "--dataset", metavar="ID", help="dataset id (4) or DatasetXXX_Name that was trained")
    parser.add_argument("-m", "--model", type=Path, metavar="DIR", help="model folder (CONFIG__NETWORK) instead of -d")
    add_trained(parser)
    parser.add_argument("-f", "--folds", nargs="+", metavar="FOLD", help="folds to export (default: all trained)")
    parser.add_argument("--checkpoint", choices=("best", "final"), default="best", help="default: best")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="zip file (default: ./DatasetXXX_Name__CONFIG__NETWORK.zip)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace that file where it exists")
    card = parser.add_argument_group("model card")
    card.add_argument("--licence", metavar="TEXT", help="of the weights (default: an imported model's, else none)")
    card.add_argument("--citation", metavar="TEXT", help="what to cite for the model, beside the method")
    forms = parser.add_argument_group("further forms of each fold's network")
    forms.add_argument(
        "--onnx", action="store_true",
        help="network.onnx for windows of the patch size, compared in onnxruntime (pip install 'ukbob_seg[onnx]')",
    )  # fmt: skip
    forms.add_argument(
        "--monai", action="store_true",
        help="monai.safetensors, which MONAI's SwinUNETR loads strictly, and the arguments to build that with",
    )  # fmt: skip
    add_roots(parser, "preprocessed", "results")
    return parser


def _print(exported: Exported) -> None:
    from ukbob_seg.files import file_sha256
    from ukbob_seg.portable.model_card import NOT_STATED

    for name, model in exported.card["models"].items():
        print(f"{name}: fold {', '.join(model['folds'])} (checkpoint_{model['checkpoint']})")
        for fold, facts in model["folds"].items():
            for form, title in (("onnx", "ONNX"), ("monai", "MONAI")):
                if facts.get(form):
                    print(f"  fold {fold}, {title}: {_difference(facts[form])}")
    print(f"licence: {exported.card['licence'] or NOT_STATED + ' (--licence)'}")
    print(f"written: {exported.file}")
    print(f"SHA-256: {file_sha256(exported.file)}")


def _difference(compared: dict[str, float | None]) -> str:
    difference = compared.get("max_abs_difference")
    if difference is None:
        return "not compared, as MONAI is not installed here"
    return f"outputs differ by {difference:.1e} at most (largest output {compared['max_abs_output']:.1e})"


if __name__ == "__main__":
    raise SystemExit(main(None))
