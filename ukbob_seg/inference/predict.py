"""Predict a folder or a single file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ukbob_seg.dataset.spec import DatasetSpec, group_channels
from ukbob_seg.errors import ConfigError, DatasetError, listing, stops_all
from ukbob_seg.files import ensure_writable, write_json
from ukbob_seg.inference.case_predictor import CasePredictor, case_stem
from ukbob_seg.inference.dicom_cases import find_dicom_jobs, refuse_without_dicom
from ukbob_seg.inference.earlier import ARGUMENTS, HASHES, PredictionJob, differences, mark_stale, what_matters
from ukbob_seg.parallel import Cluster, Part, as_finished

log = logging.getLogger(__name__)
CASES_AT_ONCE = 2  # one in the networks, one that is read or written
LABEL_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")


def find_jobs(source: Path, output: Path, spec: DatasetSpec) -> list[PredictionJob]:
    """Which cases there are to predict, and where each goes.

    Args:
        source: a folder of ``CASE_0000.ext, ...``, or one file (``CASE_0000.ext`` brings its other channels along;
            any other name is a single-channel case).
        output: a folder; for a single file also the name of the label file.
        spec: channels and file ending of the model.

    Raises:
        DatasetError: missing channels, no cases, no such source, or an output that does not fit it.
    """
    ending = spec.file_ending
    is_file = any(output.name.endswith(known) for known in (ending, *LABEL_ENDINGS)) and not output.is_dir()
    if source.is_dir():
        if is_file:
            raise DatasetError(
                f"output {output} is named like a file, but the input {source} is a folder of cases; give a folder"
            )
        grouped = group_channels(source, spec)
        if grouped.problems:
            raise DatasetError("; ".join(grouped.problems))
        if not grouped.cases:
            endings = sorted({"".join(path.suffixes[-2:]) for path in source.iterdir() if path.is_file()})
            raise DatasetError(
                f"no cases in {source}: expected files like CASE_0000{ending}, found endings {endings or 'none'}"
            )
        foreign = tuple(known for known in LABEL_ENDINGS if not ending.endswith(known))
        found = sorted(path.name for path in source.iterdir() if path.name[0] != ".")
        if others := [name for name in found if name.endswith(foreign) and not name.endswith(ending)]:
            log.warning("left out, as the model takes files that end in %s: %s", ending, listing(others, 5))
        return [
            PredictionJob(name, files, output / f"{name}{ending}", ending)
            for name, files in sorted(grouped.cases.items())
        ]
    if not source.is_file():
        raise DatasetError(f"input {source} does not exist")
    stem = case_stem(source, ending)
    name, separator, number = stem.rpartition("_")
    if separator and len(number) == 4 and number.isdigit():
        suffix = source.name.removeprefix(stem)
        files = tuple(source.with_name(f"{name}_{k:04d}{suffix}") for k in range(len(spec.channel_names)))
    else:
        name, files = stem, (source,)
    lacking = [str(path) for path in files if not path.is_file()]
    if lacking or len(files) != len(spec.channel_names):
        raise DatasetError(
            f"{source}: the model takes {len(spec.channel_names)} channels; "
            + (f"missing {', '.join(lacking)}" if lacking else "name the files CASE_0000, CASE_0001, ...")
        )
    if not is_file and output.suffix and not output.is_dir():
        raise DatasetError(
            f"output {output} ends like a file that label maps are not written to; give a folder, or a name that ends "
            f"in {listing(sorted({ending, *LABEL_ENDINGS}))}"
        )
    return [PredictionJob(name, files, output if is_file else output / f"{name}{ending}", ending)]


def predict(
    predictor: CasePredictor,
    source: Path,
    output: Path,
    resume: bool = False,
    part: Part | None = None,
    arguments: dict[str, Any] | None = None,
    quiet: bool = False,
    dicom_seg: bool = False,
) -> list[Path]:
    """Predict every case of a folder, or one file. Folders of DICOM files (see ``find_dicom_jobs``) are cases, too.

    Args:
        predictor: loaded model, or several; its settings say which classes are written, and what beside the label maps.
        source: see ``find_jobs``.
        output: see ``find_jobs``; gets dataset.json, plans.json and predict_args.json as well when it is a folder.
        resume: leave cases alone whose label file exists and is not of an earlier run that this one began to replace.
        part: only these of the cases, sorted by name; parts may run at once, into the same output folder.
        arguments: recorded in predict_args.json, with the checkpoints and settings; the same for all parts, or the
            last one's remain.
        quiet: no progress bar.
        dicom_seg: of cases that are DICOM series write ``CASE_seg.dcm`` as well.

    Returns:
        The label files of all cases of the part.

    Raises:
        DatasetError: cases that cannot be read; all others are predicted first.
        ConfigError: the output would replace an input or other label maps, or the folder holds cases that were
            predicted otherwise and would stay.
    """
    jobs = find_dicom_jobs(Path(source), Path(output), predictor.spec, dicom_seg)
    if not jobs:
        if dicom_seg:
            raise refuse_without_dicom(Path(source))
        jobs = find_jobs(Path(source), Path(output), predictor.spec)
    folder = jobs[0].output.parent
    if Path(source).is_dir() and folder.resolve() == Path(source).resolve():
        raise ConfigError(f"the output folder {folder} is the input folder; give another one with -o")
    inputs = {path.resolve() for job in jobs for path in job.images}
    for job in jobs:
        if job.output.resolve() in inputs:
            raise ConfigError(
                f"the label map would replace the image {job.output}; give another name or folder with -o"
            )
    ensure_writable(folder)
    mine = Cluster(part=part).share(jobs)
    if folder == Path(output):
        made = {"checkpoints": predictor.origin(), HASHES: predictor.checkpoint_hashes()}
        record = {**(arguments or {}), **made, "settings": what_matters(predictor.settings)}
        changed = differences(folder, record, jobs)
        if changed and resume:
            raise ConfigError(f"--resume: {changed}; predict as before, or without --resume, or into another folder")
        if not resume:
            mark_stale(jobs if changed else mine)
        contents = {"dataset.json": predictor.spec.content, "plans.json": predictor.plans.to_json(), ARGUMENTS: record}
        _write_all(folder, contents)
    todo = [job for job in mine if not (resume and job.is_finished())]
    with tqdm(total=len(todo), desc="predicting", unit="case", disable=quiet) as bar:
        problems = _predict_jobs(predictor, todo, bar)
    _report(problems, len(mine))
    return [job.output for job in mine]


def _report(problems: Sequence[tuple[PredictionJob, DatasetError]], total: int) -> None:
    """Say which cases could not be predicted.

    Raises:
        DatasetError: there are some.
    """
    if not problems:
        return
    (job, first), *others = problems
    if total == 1:
        raise first
    more = f" (also {listing([other.name for other, _ in others])}: see above)" if others else ""
    rest = "the others are predicted; " if len(problems) < total else ""
    raise DatasetError(
        f"{len(problems)} of {total} cases could not be predicted: {_named(job, first)}{more}; {rest}mend what is "
        "wrong and run the same command with --resume"
    ) from first


def _named(job: PredictionJob, error: DatasetError) -> str:
    """A problem, and whose it is."""
    return str(error) if str(error).startswith(f"case {job.name}") else f"case {job.name}: {error}"


def _write_all(folder: Path, contents: dict[str, Any]) -> None:
    for name, content in contents.items():
        write_json(folder / name, content)


class _AbandonedError(Exception):
    """The user interrupted: nobody waits for this case."""


def _predict_jobs(
    predictor: CasePredictor, jobs: Sequence[PredictionJob], bar: tqdm
) -> list[tuple[PredictionJob, DatasetError]]:
    """One case after the other through the networks; meanwhile the next is read, and the last one written.

    Returns those that cannot be read, and why; any other error ends all.
    """
    problems: list[tuple[PredictionJob, DatasetError]] = []
    given_up, no_more = threading.Event(), threading.Event()  # no case may go on; none may begin

    def work(job: PredictionJob) -> None:
        if no_more.is_set():
            return  # the error that ends all is on its way

        def show(done: int, total: int) -> None:
            if given_up.is_set():
                raise _AbandonedError
            doing = f"window {done}/{total}" if total else "adapting"
            bar.set_postfix_str(f"{job.name}: {doing}", refresh=not total or total > 8)

        try:
            job.run(predictor, show)
        except DatasetError as error:
            if stops_all(error):
                no_more.set()
                raise
            problems.append((job, error))
            earlier = "; its earlier label map is still there" if job.output.is_file() else ""
            if len(jobs) > 1 or earlier:
                log.warning("%s%s", _named(job, error), earlier)
            return
        except BaseException:
            no_more.set()
            raise
        job.stale.unlink(missing_ok=True)

    at_once = CASES_AT_ONCE if predictor.settings.overlap else 1
    with ThreadPoolExecutor(min(at_once, max(1, len(jobs)))) as pool:
        waiting: list[Future[None]] = []
        try:  # from the first on: an interrupt while the others are handed over would let all of those go on
            for job in jobs:
                waiting.append(pool.submit(work, job))
            for finished in as_finished(waiting):
                finished.result()
                bar.update()
        except BaseException as error:  # also an interrupt: the pool would go on with all that is left
            if not isinstance(error, Exception):  # else a case that has begun may end: it is not the one that failed
                given_up.set()
            for case in waiting:
                case.cancel()
            raise
    return sorted(problems, key=lambda problem: problem[0].name)


def model_folder(results: Path, dataset: str, configuration: str, network: str | None = None) -> Path:
    """``results/DatasetXXX_Name/CONFIG__NETWORK``; without a network Swin-BOB's, or else the only one trained.

    Raises:
        ConfigError: no network is named and several were trained, but not Swin-BOB.
    """
    from ukbob_seg.dataset.paths import find_dataset

    folder = find_dataset(results, dataset)
    preferred = folder / f"{configuration}__{(network or 'swin_unetr').replace(':', '.')}"
    if network is not None or preferred.is_dir():
        return preferred
    trained = sorted(path.name.split("__", 1)[1] for path in folder.glob(f"{configuration}__*"))
    if len(trained) > 1:
        raise ConfigError(f"{folder} has {configuration} of {', '.join(trained)}; choose one with --network")
    return folder / f"{configuration}__{trained[0]}" if trained else preferred
