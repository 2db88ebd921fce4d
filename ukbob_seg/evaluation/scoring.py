"""Scores of all cases: computed by worker processes, kept as they come, and not computed again."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ukbob_seg.dataset.image_io import read_geometry, read_labels
from ukbob_seg.dataset.labels import LabelScheme
from ukbob_seg.dataset.spec import summarise_problems
from ukbob_seg.errors import DatasetError, UkbobError
from ukbob_seg.evaluation.metrics import MOST_CLASSES, evaluate_case, metric_names, present_values
from ukbob_seg.evaluation.pairing import Pair
from ukbob_seg.files import digest
from ukbob_seg.parallel import HERE, Cluster, choose_workers, map_cases
from ukbob_seg.shards import Shard, find_shards, known_cases, load_shards, shard_size

logger = logging.getLogger(__name__)

TABLE, PARTS = "metrics.parquet", "metrics_parts"
_VERSION = 2  # raise it when the meaning of a metric changes: kept scores are then computed again
_IN_PROCESS_VOXELS = 2e7  # starting worker processes takes longer than scoring this many voxels
_BYTES_PER_VOXEL = 60
_BYTES_PER_WORKER = 3e8


@dataclass(frozen=True)
class CaseScoring:
    """Reads and scores cases; picklable, for worker processes.

    Attributes:
        scheme: what the label values mean; None scores every value that occurs, named by its number.
        tolerances: of the normalized surface Dice, mm.
    """

    scheme: LabelScheme | None
    tolerances: tuple[float, ...]

    def key(self, pair: Pair) -> str:
        """Hash of what the scores depend on: options, and path, size and modification time of both files."""
        scheme = self.scheme and [self.scheme.names, self.scheme.members, self.scheme.values, self.scheme.ignore_value]
        try:
            stats = [(path.resolve(), path.stat()) for path in (pair.prediction, pair.reference)]
        except OSError:
            return ""  # reading it will say what is wrong
        # The path, too: predictions of two models, unpacked from archives, may have one size and one time.
        files = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        return digest([_VERSION, scheme, self.tolerances, files])

    def __call__(self, pair: Pair) -> pd.DataFrame:
        """One row per class: case, class, and ``metric_names``.

        Raises:
            DatasetError: a file cannot be read, the grids differ, or a label value is unknown; names the case.
        """
        try:
            metrics = self._score(pair)
        except UkbobError as error:
            raise DatasetError(f"case {pair.case}: {error}") from error
        return metrics_table({pair.case: metrics}, self.tolerances)

    def _score(self, pair: Pair) -> dict[str, dict[str, float]]:
        reference, geometry = read_labels(pair.reference)
        prediction, other = read_labels(pair.prediction)
        difference = geometry.difference(other, ("the reference", "the prediction"))
        if difference is not None:
            raise DatasetError(f"{difference}; resample the prediction to the reference's grid or correct its header")
        labels: dict[str, tuple[int, ...]]
        ignore: int | None = None
        if self.scheme is not None:
            prediction = self.scheme.to_indices(prediction, where=f"prediction {pair.prediction.name}")
            reference = self.scheme.to_indices(reference, where=f"reference {pair.reference.name}")
            labels = {
                name: tuple(int(k) for k in np.flatnonzero(row))
                for name, row in zip(self.scheme.names, self.scheme.region_table, strict=True)
            }
            ignore = self.scheme.ignore_index if self.scheme.ignore_value is not None else None
        else:
            values = sorted({*present_values(prediction), *present_values(reference)})
            if len(values) > MOST_CLASSES:
                raise DatasetError(
                    f"{len(values)} different values in {pair.prediction.name} and {pair.reference.name}; "
                    "are these label maps, not images?"
                )
            labels = {str(value): (value,) for value in values}
        return evaluate_case(prediction, reference, geometry.spacing_mm, labels, self.tolerances, ignore_value=ignore)


def metrics_table(cases: Mapping[str, Mapping[str, Mapping[str, float]]], tolerances: Sequence[float]) -> pd.DataFrame:
    """One row per case and class; columns case, class, and ``metric_names``."""
    rows = [
        {"case": case, "class": name, **found} for case, classes in cases.items() for name, found in classes.items()
    ]
    table = pd.DataFrame(rows, columns=["case", "class", *metric_names(tolerances)])
    return table.astype({"case": object, "class": object})


@dataclass(frozen=True)
class ScoredCases:
    """What ``score_cases`` found.

    Attributes:
        table: one row per case and class, cases in any order; a case in which nothing is present may have none.
        keys: case -> hash of what its scores depend on.
        computed: cases scored in this run; the others were known.
    """

    table: pd.DataFrame
    keys: Mapping[str, str]
    computed: int

    def keep(self, folder: Path) -> None:
        """Write ``metrics.parquet`` with all cases, from which a later run takes what has not changed."""
        Shard(self.keys, self.table).save(Path(folder) / TABLE)
        shutil.rmtree(Path(folder) / PARTS, ignore_errors=True)


def score_cases(
    pairs: Sequence[Pair],
    scoring: CaseScoring,
    folder: Path | None = None,
    workers: int | None = None,
    cluster: Cluster = HERE,
    overwrite: bool = False,
) -> ScoredCases:
    """Score all cases, except those whose kept scores still fit.

    Args:
        pairs: at least one; with a part in ``cluster``, only that part of them is looked at.
        scoring: how.
        folder: where scores are kept: those of earlier runs in ``metrics.parquet``, those of this one, until all are
            there, in ``metrics_parts/``. None keeps nothing.
        workers: processes; None chooses.
        cluster: Dask scheduler and part.
        overwrite: score all again.

    Raises:
        DatasetError: no case, one twice, or some cannot be scored (all in one message); the others are kept.
        UkbobError: a worker died, or nothing can be written.
    """
    if not pairs:
        raise DatasetError("there is no case to evaluate")
    twice = [case for case, count in Counter(pair.case for pair in pairs).items() if count > 1]
    if twice:
        raise DatasetError(f"case {twice[0]} is listed twice")
    mine = cluster.share(pairs)
    keys = {pair.case: scoring.key(pair) for pair in mine}
    known = {} if folder is None or overwrite else _known(folder, keys)
    pending = [pair for pair in mine if pair.case not in known]
    if known:
        logger.info("%d of %d cases were scored earlier and have not changed", len(known), len(mine))
    size = shard_size(len(mine)) if folder is not None else 1
    jobs = [
        _Job(tuple((pair, keys[pair.case]) for pair in pending[i : i + size]), folder)
        for i in range(0, len(pending), size)
    ]
    done: list[tuple[Shard, list[str]]] = []
    if jobs:
        count = choose_process_count(pending, workers)
        if count > 1:
            compile_kernels()
        amounts = [len(job.pairs) for job in jobs]
        done = map_cases(_ScoreShard(scoring), jobs, count, "evaluating", scheduler=cluster.scheduler, amounts=amounts)
    problems = [problem for _, found in done for problem in found]
    if problems:
        raise DatasetError(summarise_problems(problems))
    shards = [*{id(shard): shard for shard in known.values()}.values(), *(shard for shard, _ in done)]
    frames = [shard.rows for shard in shards if len(shard.rows)]
    table = pd.concat(frames, ignore_index=True) if frames else metrics_table({}, scoring.tolerances)
    return ScoredCases(table, keys, len(pending))


def compile_kernels() -> None:
    """Compile (or load) the kernels for the commonest types here, so that workers find them in the cache."""
    labels = np.zeros((2, 2, 2, 2), np.uint8)
    labels[0, 0] = labels[1, :, 0] = 1
    evaluate_case(labels[0], labels[1], (1.0, 1.0, 1.0), [1])


def choose_process_count(pairs: Sequence[Pair], requested: int | None) -> int:
    """Processes that the work is worth and the memory allows, judged by the largest reference file."""
    try:
        largest = max((pair.reference for pair in pairs), key=lambda path: path.stat().st_size)
        voxels = float(np.prod(read_geometry(largest).shape))
    except (DatasetError, OSError):
        voxels = 0.0  # a file that cannot be read is reported when its turn comes
    if requested is None and voxels * len(pairs) < _IN_PROCESS_VOXELS:
        return 1
    return choose_workers(requested, len(pairs), (voxels * _BYTES_PER_VOXEL + _BYTES_PER_WORKER) / 2**30)


@dataclass(frozen=True)
class _Job:
    """Some cases to score, and the folder of the results, in which they are kept together."""

    pairs: tuple[tuple[Pair, str], ...]  # with their keys
    folder: Path | None


@dataclass(frozen=True)
class _ScoreShard:
    """Scores some cases and writes their shard; a case that fails does not stop the others."""

    scoring: CaseScoring

    def __call__(self, job: _Job) -> tuple[Shard, list[str]]:
        """The scores, and what is wrong with the cases that have none."""
        problems: list[str] = []
        keys: dict[str, str] = {}
        frames = [metrics_table({}, self.scoring.tolerances)]
        try:
            for pair, key in job.pairs:
                try:
                    frames.append(self.scoring(pair))
                    keys[pair.case] = key
                except DatasetError as error:
                    problems.append(str(error))
        finally:  # also when interrupted: what was scored is kept
            rows = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
            shard = Shard(keys, rows)
            if keys and job.folder is not None:
                # Named by its content: parts of a job array share the folder.
                shard.save(Path(job.folder) / PARTS / f"shard_{digest(keys)}.parquet")
        return shard, problems


def _known(folder: Path, keys: Mapping[str, str]) -> dict[str, Shard]:
    paths = [*find_shards(Path(folder) / PARTS), Path(folder) / TABLE]  # parts of this run first
    return known_cases(load_shards(paths, keys).values(), keys)
