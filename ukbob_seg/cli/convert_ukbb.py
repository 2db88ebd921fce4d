"""ukbob_convert ukbb: UK Biobank's Dixon archives to scans of four channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ukbob_seg.cli.common import add_cluster, add_workers
from ukbob_seg.cli.convert_layouts import add_folders, check_folders
from ukbob_seg.errors import listing

if TYPE_CHECKING:
    import argparse

DESCRIPTION = (
    "Stitch the stations of UK Biobank Dixon archives (field 20201) to one scan per archive, with the channels fat,\n"
    "water, inphase, outphase: intensities matched and blended where stations overlap, exchanged water and fat found.\n"
    "stations.csv has a row for every station, conversion.parquet one for every archive. Finished archives are kept,\n"
    "so that an interrupted run goes on where it stopped. Needs pip install 'ukbob_seg[dicom]'."
)
EXAMPLE = (
    "  ukbob_convert ukbb -i archives -o ukbob_data/raw/Dataset020_Dixon --repair-swaps --skip-incomplete\n"
    "  ukbob_convert ukbb -i archives -o ukbob_data/raw/Dataset020_Dixon --part $SLURM_ARRAY_TASK_ID/64   # job array"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, how to stitch, which archives."""
    add_folders(
        parser,
        "folder of archives such as 1234567_20201_2_0.zip (or of folders of DICOM files), at any depth, or one archive",
    )
    group = parser.add_argument_group("how archives are stitched")
    group.add_argument(
        "--spacing", nargs=3, type=float, metavar=("Z", "Y", "X"),
        help="voxels of the result in mm (default: the finest that was acquired, along each axis)",
    )  # fmt: skip
    group.add_argument(
        "--repair-swaps", action="store_true",
        help="exchange water and fat of stations where they were found exchanged (default: only say so in the table)",
    )  # fmt: skip
    group.add_argument(
        "--stations", type=int, default=6, metavar="N", help="that an archive must have; 0 for any number (default: 6)"
    )
    cases = parser.add_argument_group("which archives, and where to")
    cases.add_argument(
        "--skip-incomplete", action="store_true",
        help="leave out archives with missing or damaged files instead of stopping at the end; see incomplete.csv",
    )  # fmt: skip
    cases.add_argument(
        "--ignore-manifest", action="store_true",
        help="do not compare an archive's files with the list in it (default: one that lacks some is incomplete)",
    )  # fmt: skip
    cases.add_argument("--test", action="store_true", help="write to imagesTs, for prediction (default: imagesTr)")
    add_workers(parser)
    add_cluster(parser, "when all parts are done, run once without it")


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what was found."""
    check_folders(arguments)
    from ukbob_seg.conversion.ukbb import CohortOptions, convert_cohort
    from ukbob_seg.conversion.ukbb_case import StitchOptions
    from ukbob_seg.parallel import Cluster, Part

    part = None if arguments.part is None else Part.parse(arguments.part)
    spacing = None if arguments.spacing is None else tuple(arguments.spacing)
    options = CohortOptions(
        StitchOptions(
            None if arguments.stations == 0 else arguments.stations,
            spacing,
            arguments.repair_swaps,
            not arguments.ignore_manifest,
        ),
        arguments.test,
        arguments.skip_incomplete,
        arguments.workers,
        Cluster(arguments.scheduler, part),
    )
    done = convert_cohort(arguments.input, arguments.output, options)
    share = "" if part is None else f"part {part.number} of {part.total}: "
    print(f"{share}{done.converted} archives read, {done.kept} were done already; {done.complete} complete")
    if done.incomplete:
        names = listing([name for name, _ in done.incomplete])
        plural = "s" if len(done.incomplete) > 1 else ""
        print(f"{len(done.incomplete)} incomplete archive{plural} left out (see incomplete.csv): {names}")
    what = "set right" if arguments.repair_swaps else "left as they are (--repair-swaps sets them right)"
    if done.swapped:
        print(f"{done.swapped} station{'s' if done.swapped > 1 else ''} with water and fat exchanged, {what}")
    if done.doubtful:
        print(f"{done.doubtful} stations where that is hard to tell: swap_confidence below 0.2 in stations.csv")
    if done.unusual:
        named = listing([f"{case} (station {', '.join(map(str, numbers))})" for case, numbers in done.unusual], most=3)
        print(f"other numbers of slices than most archives have, usual_slices in stations.csv: {named}")
    if part is not None:
        print("when all parts are done, run the same command once without --part")
    else:
        images = done.folder / ("imagesTs" if arguments.test else "imagesTr")
        print(f"scans in {images}, one row per station in {done.folder / 'stations.csv'}")
