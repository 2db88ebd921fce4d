"""progress.csv and progress.png, rewritten from the history after every epoch, and curves for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ukbob_seg.errors import ConfigError
from ukbob_seg.files import atomic_path, write_text

COLUMNS = ("epoch", "learning_rate", "train_loss", "val_mean_dice", "seconds", "data_seconds", "skipped_steps")


def write_csv(path: Path, history: Sequence[dict[str, Any]], class_names: Sequence[str]) -> None:
    """One row per epoch; validation columns are empty where there was no validation."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"val_dice_{name}" for name in class_names)])
    for row in history:
        dice = row.get("val_dice") or [None] * len(class_names)
        cells = [row.get(column) for column in COLUMNS] + list(dice)
        writer.writerow(["" if cell is None else f"{cell:.6g}" for cell in cells])
    write_text(path, buffer.getvalue())


def write_plot(path: Path, history: Sequence[dict[str, Any]], title: str) -> None:
    """Loss, learning rate and validation Dice over epochs."""
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 7))
    loss_axis, dice_axis = figure.subplots(2, 1, sharex=True)
    loss_axis.plot(epochs, [row["train_loss"] for row in history], color="#1f6feb", label="training loss")
    loss_axis.set_ylabel("loss")
    loss_axis.set_title(title)
    rate_axis = loss_axis.twinx()
    rate_axis.plot(epochs, [row["learning_rate"] for row in history], color="#b0b8c1", lw=1)
    rate_axis.set_ylabel("learning rate", color="#8a939d")
    validated = [row for row in history if row.get("val_mean_dice") is not None]
    for position in range(len(validated[0]["val_dice"]) if validated else 0):
        dice_axis.plot(
            [row["epoch"] for row in validated],
            [row["val_dice"][position] for row in validated],
            color="#c9d6e6",
            lw=0.8,
        )
    dice_axis.plot(
        [row["epoch"] for row in validated], [row["val_mean_dice"] for row in validated], "o-", ms=3, color="#d1495b",
        label="mean Dice (thin lines: classes)",
    )  # fmt: skip
    dice_axis.set_ylim(0, 1)
    dice_axis.set_ylabel("validation Dice")
    dice_axis.set_xlabel("epoch")
    for axis in (loss_axis, dice_axis):
        axis.grid(alpha=0.25)
    if validated:
        dice_axis.legend(loc="lower right", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, bbox_inches="tight")


@contextmanager
def scalar_log(folder: Path | None) -> Iterator[Callable[[dict[str, Any], Sequence[str]], None]]:
    """Yield a function that writes one row of the history into ``folder/tensorboard``; None: nothing is written.

    A resumed run adds a file; TensorBoard joins them by the epoch.

    Raises:
        ConfigError: the package is not installed.
    """
    if folder is None:
        yield lambda row, class_names: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs a package that is not installed: pip install tensorboard, or drop the option"
        ) from error
    writers: list[SummaryWriter] = []

    def write(row: dict[str, Any], class_names: Sequence[str]) -> None:
        if not writers:  # only now, since a run that is refused writes nothing
            writers.append(SummaryWriter(str(folder / "tensorboard")))
        values = {"training/loss": row["train_loss"], "training/learning_rate": row["learning_rate"]}
        if row.get("val_mean_dice") is not None:
            values["validation/mean_dice"] = row["val_mean_dice"]
            values |= {f"validation/{name}": dice for name, dice in zip(class_names, row["val_dice"], strict=True)}
        for name, value in values.items():
            writers[0].add_scalar(name, value, row["epoch"])
        writers[0].flush()

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()
