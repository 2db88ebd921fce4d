"""ukbob_import_model: a model folder of an exported file."""

from __future__ import annotations

from pathlib import Path

from ukbob_seg.cli.common import add_roots, command, make_parser, roots_from


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, import, print."""
    parser = make_parser(
        "ukbob_import_model",
        "Check a file of ukbob_export_model and make results/DatasetXXX_Name/CONFIG__NETWORK of it, so that "
        "ukbob_predict and ukbob_train --pretrained find it. A damaged or dangerous file is refused before anything is "
        "written.",
        "  ukbob_import_model Dataset004_Hippocampus__3d_fullres__swin_unetr.zip\n"
        "  ukbob_import_model model.zip --results models",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="zip file of ukbob_export_model")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace model folders that exist, with everything that is in them"
    )
    add_roots(parser, "results")
    arguments = parser.parse_args(argv)
    roots = roots_from(arguments)

    from ukbob_seg.portable.importing import import_model
    from ukbob_seg.portable.model_card import NOT_STATED

    try:
        imported = import_model(arguments.file, roots.results, arguments.overwrite)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("interrupted; nothing was written") from interrupt
    for folder in imported.folders:
        print(f"written: {folder}")
    print(f"SHA-256 of the file: {imported.sha256}")
    licence = imported.card["licence"] or NOT_STATED
    print(f"licence: {licence if licence.isprintable() else 'see ' + str(imported.folders[0] / 'model_card.json')}")
    print("predict with:")
    print(f"  {imported.command}")


if __name__ == "__main__":
    raise SystemExit(main(None))
