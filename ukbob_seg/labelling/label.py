"""Label a cohort: predict every case and write images and label maps as one raw dataset.

The dataset holds ``imagesTr`` (links, or copies), ``labelsTr`` and dataset.json, and beside them ``labelling/`` with a
record per case and ``labelling.json``, which says of which cohort it is and how the labels were made. A case is
finished when it has the label map of its images; the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ukbob_seg.conversion.target import has_free_number
from ukbob_seg.dataset.spec import Case
from ukbob_seg.errors import ConfigError, DatasetError, listing
from ukbob_seg.files import ensure_writable, write_json
from ukbob_seg.inference.earlier import what_matters
from ukbob_seg.labelling.claim import COHORT, HASHES, claim
from ukbob_seg.labelling.cohort import Cohort
from ukbob_seg.labelling.labeller import Labeller, close, keep, with_fusion
from ukbob_seg.labelling.options import LabelOptions
from ukbob_seg.labelling.outputs import HOW, TABLE, is_finished, label_names, place_images, write_table
from ukbob_seg.labelling.roi import load_model
from ukbob_seg.nnunet.archive import unpacked_folders
from ukbob_seg.parallel import choose_workers, map_cases

log = logging.getLogger(__name__)


def label_cohort(source: Path, output: Path, options: LabelOptions) -> Path:
    """Label the cases of a cohort; those that are finished are left alone.

    Args:
        source: raw dataset, or folder of ``CASE_0000.ext`` files.
        output: dataset folder, ``DatasetXXX_Name``.
        options: how.

    Returns:
        ``output``.

    Raises:
        ConfigError: options that do not fit, a number that another dataset has, or an output that holds labels made
            otherwise, or of another cohort.
        DatasetError: cases that cannot be read, unless they are skipped; all others are labelled first.
        CheckpointError: the model cannot be used.
    """
    cohort = Cohort.find(Path(source), options.channel_names)
    output = Path(output)
    if output.resolve() in (Path(source).resolve(), cohort.folder.resolve()):
        raise ConfigError(f"the output {output} is the cohort itself; give another folder with --output")
    if not has_free_number(output.absolute()):
        log.warning("%s is not named DatasetXXX_Name: other commands find datasets under such names only", output)
    labeller, record, content = _prepare(cohort, output, options)
    try:
        _label(cohort, output, labeller, record, content)
    finally:
        close()
    return output


def _label(
    cohort: Cohort, output: Path, labeller: Labeller, record: Mapping[str, Any], content: dict[str, Any]
) -> None:
    """Write the dataset; cases that are finished are left alone."""
    options, ending = labeller.options, cohort.file_ending
    ensure_writable(output)
    claim(cohort, output, record, options.overwrite, options.cluster.part is not None)
    write_json(output / "dataset.json", content)
    mine = options.cluster.share(cohort.cases)
    finished = {case.name for case in mine if is_finished(output, case, ending)}
    if options.copy:
        for case in mine:
            if case.name in finished:  # with links, perhaps
                place_images(case, output / "imagesTr", copy=True)
    todo = [case for case in mine if case.name not in finished]
    if todo:
        _run(labeller, todo, options)
    problems = write_table(output, [case.name for case in cohort.cases])
    if problems:
        write_json(output / "dataset.json", {**content, "numTraining": len(cohort.cases) - len(problems)})
    _report(output, {case.name: problems[case.name] for case in mine if case.name in problems}, len(mine), options)


def _report(output: Path, problems: Mapping[str, str], total: int, options: LabelOptions) -> None:
    """Say which cases could not be labelled.

    Raises:
        DatasetError: there are some, and they are not to be skipped, or there are no others.
    """
    if not problems:
        return
    name, problem = next(iter(problems.items()))
    said = f"{len(problems)} of {total} cases could not be labelled ({listing(list(problems))}; {name}: {problem})"
    if not options.skip_failed or len(problems) == total:
        raise DatasetError(
            f"{said}; all problems are in {output / TABLE}: mend these images and run the same command again, or leave "
            "them out with --skip-failed; the others are labelled"
        )
    log.warning("%s; they are left out, all problems are in %s", said, output / TABLE)


def _prepare(cohort: Cohort, output: Path, options: LabelOptions) -> tuple[Labeller, dict[str, Any], dict[str, Any]]:
    """The labeller, the record of how it labels, and the content of dataset.json; the model is loaded for these.

    Where others will predict it is loaded on the CPU, and let go of again.
    """
    device = options.devices[0] if _is_alone(options) else "cpu"
    predictor = load_model(options, device)
    spec, origin, hashes = predictor.spec, predictor.origin(), predictor.checkpoint_hashes()
    labels = label_names(spec, options.names)
    values = tuple((name, value) for name, value in labels.items() if isinstance(value, int) and value)
    if options.fuse is None:
        channels = cohort.choose(options.channel, len(spec.channel_names), "--channel")
    else:
        channels = cohort.choose(options.fuse, len(options.fuse), "--fuse")
    names = tuple(cohort.channel_names[k] for k in channels)
    # Of fused channels, all of which the model takes for the same one, none has its name.
    called = cohort.channel_names if options.fuse else cohort.names_by_model(channels, spec.channel_names)
    predictor = with_fusion(options, predictor, names, dict(values))
    record = {
        COHORT: str(cohort.folder.resolve()),
        "checkpoints": origin,
        HASHES: hashes,
        "settings": what_matters(options.settings),
        "channels": list(names),
        "merged": options.fuse is not None,
        "labels": labels,
    }
    content: dict[str, Any] = {
        "channel_names": {str(k): name for k, name in enumerate(called)},
        "labels": labels,
        "numTraining": len(cohort.cases),
        "file_ending": cohort.file_ending,
        "name": output.name,
        "description": f"labelled by {spec.name} with ukbob_label; see {HOW}",
    }
    if "regions_class_order" in spec.content and spec.labels.has_regions:
        content["regions_class_order"] = spec.content["regions_class_order"]
    labeller = Labeller(
        options, options.devices[0], channels, names, values, output.resolve(), cohort.file_ending,
        tuple(unpacked_folders().items()), options.cluster.scheduler is not None,
    )  # fmt: skip
    if _is_alone(options):
        keep(labeller, predictor)
    else:
        predictor.close()
    return labeller, json.loads(json.dumps(record)), content


def _is_alone(options: LabelOptions) -> bool:
    """Whether this process predicts all cases itself."""
    return options.cluster.scheduler is None and len(options.devices) == 1 and (options.workers or 1) == 1


def _run(labeller: Labeller, todo: Sequence[Case], options: LabelOptions) -> None:
    """On the machines and devices that there are."""
    quiet, devices = options.quiet, options.devices
    if options.cluster.scheduler is not None:
        map_cases(labeller, todo, description="labelling", quiet=quiet, scheduler=options.cluster.scheduler)
    elif len(devices) > 1:
        shares = [(device, todo[k :: len(devices)]) for k, device in enumerate(devices)]
        items = [
            (dataclasses.replace(labeller, device=device), (share, -1 if quiet else row))
            for row, (device, share) in enumerate(shares)
            if share
        ]
        map_cases(_label_share, items, workers=len(items), description="labelling", quiet=True)
    elif (workers := choose_workers(options.workers or 1, len(todo))) > 1:
        map_cases(labeller, todo, workers=workers, description="labelling", quiet=quiet)
    else:
        labeller.all_of((todo, -1 if quiet else 0))


def _label_share(item: tuple[Labeller, tuple[Sequence[Case], int]]) -> int:
    return item[0].all_of(item[1])
