"""Writes the log of a training run: CSV files, TensorBoard, and a plot at the end."""

from __future__ import annotations

import csv
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from illama.atomic_write import write_file

LOSS_COLUMNS = ("step", "train_loss")
_EPOCH_COLUMNS = ("epoch", "step", "learning_rate", "soft_mask", "train_loss")  # and two that follow
_VALIDATION = "validation_"


class Log:
    """Writes a row per epoch to log.csv, the loss of every few steps to losses.csv, and both to TensorBoard.

    Args:
        step: step at which the run is resumed; rows of later steps are removed.
        score: name of the validation score.
    """

    def __init__(self, out: Path, step: int, score: str = "top1") -> None:
        self.epochs, self.losses = out / "log.csv", out / "losses.csv"
        self.columns = (*_EPOCH_COLUMNS, f"{_VALIDATION}{score}", "images_per_second")
        for path, columns in ((self.epochs, self.columns), (self.losses, LOSS_COLUMNS)):
            rows = [row for row in read_log(path) if int(row["step"]) <= step] if path.exists() else []
            with write_file(path) as draft, draft.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write_loss(self, step: int, loss: float) -> None:
        """Appends the mean training loss of the steps since the last call."""
        _append(self.losses, step, loss)
        self.board.add_scalar("loss", loss, step)

    def write_epoch(self, *values: float) -> None:
        """Appends a row to log.csv, with one value for each column."""
        _append(self.epochs, *values)
        _, step, *rest = values
        for name, value in zip(self.columns[2:], rest, strict=True):
            self.board.add_scalar(name, value, int(step))
        self.board.flush()


def _append(path: Path, *values: float) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file).writerow([str(v) if isinstance(v, int) else f"{v:.6g}" for v in values])


def read_log(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a log.csv or losses.csv, without an incomplete last line (after a full disk)."""
    whole, _, _ = path.read_text().rpartition("\n")
    return list(csv.DictReader(whole.splitlines()))


def plot_curve(rows: list[dict[str, str]], path: Path) -> None:
    """Plots training loss and validation score over the epochs to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    loss_axis = figure.add_subplot()
    score_axis = loss_axis.twinx()
    epochs = [int(row["epoch"]) for row in rows]
    loss_axis.plot(epochs, [float(row["train_loss"]) for row in rows], color="tab:blue")
    score = next(column for column in rows[0] if column.startswith(_VALIDATION))
    score_axis.plot(epochs, [float(row[score]) for row in rows], color="tab:orange")
    loss_axis.set(xlabel="epoch")
    loss_axis.set_ylabel("training loss (augmented images)", color="tab:blue")
    score_axis.set_ylabel(f"{score.replace('_', ' ')} (%)", color="tab:orange")
    figure.savefig(path, dpi=120)
