"""ukbob_benchmark embeddings: t-SNE of the class embeddings of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_roots, choose_device, roots_from
from ukbob_seg.cli.models import add_model, model_folders

if TYPE_CHECKING:
    import argparse

    import pandas as pd

    from ukbob_seg.benchmark.embeddings_map import EmbeddingMap

DESCRIPTION = (
    "Average the last feature map of a trained model, the input of its segmentation head, over the voxels of every\n"
    "class of every case; draw the result by t-SNE and say how far the classes lie apart (Figure 11 of the paper).\n"
    "One fold of one model. Needs scikit-learn: pip install 'ukbob_seg[tsne]'"
)
EXAMPLE = (
    "  ukbob_benchmark embeddings -d 4 -f 0 -i ukbob_data/raw/Dataset004_Hippocampus/imagesTs -o embeddings\n"
    "  ukbob_benchmark embeddings -d 4 -f 0 -i scans -o embeddings --references labels\n"
    "  ukbob_benchmark embeddings -m results/Dataset004_X/3d_fullres__swin_unetr -f 0 -i scans -o embeddings "
    "--of prediction"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, images, labels, the map."""
    parser.add_argument("-i", "--input", type=Path, required=True, help="folder of CASE_0000.ext files, or one file")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", required=True,
        help="for embeddings.parquet, embeddings.json, tsne.csv and embeddings.html",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument(
        "--of", choices=("reference", "prediction"), default="reference",
        help="what says which voxels a class has: reference labels (default), or the model's own prediction",
    )  # fmt: skip
    parser.add_argument(
        "--references", type=Path, metavar="DIR",
        help="folder of reference label maps CASE.ext (default: labelsTs beside imagesTs, labelsTr beside imagesTr)",
    )  # fmt: skip
    parser.add_argument(
        "--step-size", type=float, default=0.5, metavar="S", help="window distance / patch (default: 0.5)"
    )
    parser.add_argument(
        "--window-batch", type=int, default=1, metavar="N", help="windows per forward pass (default: 1)"
    )
    parser.add_argument(
        "--perplexity", type=float, metavar="P",
        help="of t-SNE (default: 30, or a third of the other embeddings where these are fewer than 90)",
    )  # fmt: skip
    add_roots(parser, "results")


def run(arguments: argparse.Namespace) -> None:
    """Embed, map, draw, print."""
    from ukbob_seg.benchmark.embeddings import EmbeddingModel, embed_cases, find_cases
    from ukbob_seg.benchmark.embeddings_map import make_map, require_tsne
    from ukbob_seg.errors import ConfigError
    from ukbob_seg.inference.settings import PredictionSettings

    require_tsne()  # now, not after an hour
    folders, folds = model_folders(arguments, roots_from(arguments)), arguments.folds or [None]
    if len(folders) > 1 or len(folds) > 1:
        raise ConfigError("every network has features of its own: give one model and one fold")
    if arguments.of == "prediction" and arguments.references is not None:
        raise ConfigError("--references is not used with --of prediction; give one of them")
    settings = PredictionSettings(step=arguments.step_size, window_batch=arguments.window_batch, postprocessing=False)
    device = choose_device(arguments.device)
    model = EmbeddingModel.load(folders[0], folds[0], arguments.checkpoint, device, settings)
    cases = find_cases(arguments.input, arguments.references, arguments.of, model)
    table = embed_cases(model, cases, arguments.output)
    result = make_map(table, arguments.perplexity, model.spec.labels.names)
    _write(arguments, table, result, f"{folders[0].parent.name}, {folders[0].name}; {arguments.input}")


def _write(arguments: argparse.Namespace, table: pd.DataFrame, result: EmbeddingMap, source: str) -> None:
    from ukbob_seg.benchmark.embeddings_report import NUMBERS, PAGE, PLACES, write_places, write_report
    from ukbob_seg.files import write_json

    write_places(arguments.output / PLACES, result)
    write_json(arguments.output / NUMBERS, result.to_json())
    by = "the reference labels" if arguments.of == "reference" else "the model's own prediction, without postprocessing"
    write_report(arguments.output / PAGE, result, source, [f"Which voxels a class has: {by}."])
    width = max(5, *(len(name) for name in result.classes.index))
    print(f"{'class':<{width}}  embeddings  nearest to its own  silhouette")
    for name, row in result.classes.iterrows():
        print(f"{name!s:<{width}}  {row['points']:>10}  {row['correct']:>18.3f}  {row['silhouette']:>10.3f}")
    print(f"{'all':<{width}}  {len(table):>10}  {result.accuracy:>18.3f}  {result.silhouette:>10.3f}")
    print(f"-> {arguments.output / PAGE}")
