"""ukbob_benchmark convert: from a challenge's folder to a raw dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ukbob_seg.benchmark.protocol import MODALITIES, ConvertOptions
from ukbob_seg.benchmark.protocols import PROTOCOLS
from ukbob_seg.cli.common import add_roots, add_workers, roots_from

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Convert a challenge's official folder into a raw dataset. Files that need no change are copied; what is there\n"
    "already is skipped, so that an interrupted conversion goes on where it stopped. Expected folders:\n"
    + "\n".join(f"{name}: {protocol.title}\n{protocol.layout}" for name, protocol in PROTOCOLS.items())
)
EXAMPLE = (
    "  ukbob_benchmark convert btcv ~/downloads/Abdomen/RawData -d 610\n"
    "  ukbob_benchmark convert amos ~/downloads/amos22 -d 611 --modality all --all-organs --link"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Protocol, source, number, the protocols' options."""
    parser.add_argument("protocol", choices=PROTOCOLS, metavar="PROTOCOL", help=f"one of {', '.join(PROTOCOLS)}")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the challenge's folder")
    parser.add_argument("-d", "--dataset", type=int, metavar="ID", required=True, help="number of the new dataset")
    parser.add_argument("--link", action="store_true", help="link files that need no change instead of copying them")
    group = parser.add_argument_group("options of one protocol")
    group.add_argument("--modality", choices=MODALITIES, help="amos: MRI has ids above 500 (default: mri)")
    group.add_argument(
        "--all-organs", action="store_true", default=None, help="amos: 15 organs, not 13 without bladder and prostate"
    )
    group.add_argument(
        "--validation",
        action="store_true",
        default=None,
        help="amos: train on imagesVa, too (default: they go to imagesVa and labelsVa, for scoring)",
    )
    group.add_argument(
        "--separate-adrenals",
        action="store_true",
        default=None,
        help="btcv: 13 classes, as the challenge has them (default: 12, the adrenal glands merged as in the paper)",
    )
    add_workers(parser)
    add_roots(parser, "raw", "preprocessed")


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what is where."""
    from ukbob_seg.benchmark.convert import convert

    options = ConvertOptions(
        arguments.modality, arguments.all_organs, arguments.validation, arguments.separate_adrenals
    )
    done = convert(
        arguments.protocol,
        arguments.source,
        arguments.dataset,
        roots_from(arguments),
        options,
        arguments.link,
        arguments.workers,
    )
    edition = f" (edition {done.edition})" if done.edition else ""
    validation = f", {done.cases['Va']} validation" if done.cases["Va"] else ""
    print(
        f"{done.converted} cases converted, {done.kept} were there already: {done.cases['Tr']} training{validation}, "
        f"{done.cases['Ts']} test{edition} -> {done.folder}"
    )
    if done.clip is not None:
        low, high = done.clip
        print(
            f"intensities are clipped to [{low:g}, {high:g}] HU in the written images; predict from the written "
            "imagesTs, not from the challenge's files"
        )
    print(f"next: ukbob_plan_and_preprocess -d {arguments.dataset}")
