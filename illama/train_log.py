"""What a training run says of itself while it runs: log.csv, TensorBoard, and the curve at the end."""

from __future__ import annotations

import csv
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from illama.bundle import write_file

COLUMNS = ("epoch", "step", "learning_rate", "soft_mask", "train_loss", "validation_top1", "images_per_second")
LOSS_COLUMNS = ("step", "train_loss")


class Log:
    """A row per epoch in log.csv, the loss of every few steps in losses.csv, both for TensorBoard too.

    Rows after the resumed step are dropped.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.epochs, self.losses = out / "log.csv", out / "losses.csv"
        for path, columns in ((self.epochs, COLUMNS), (self.losses, LOSS_COLUMNS)):
            rows = [row for row in read_log(path) if int(row["step"]) <= step] if path.exists() else []
            with write_file(path) as draft, draft.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write_loss(self, step: int, loss: float) -> None:
        """Append the mean training loss of the steps since the last call."""
        _append(self.losses, step, loss)
        self.board.add_scalar("loss", loss, step)

    def write_epoch(self, *values: float) -> None:
        """Append one value for each of :data:`COLUMNS`."""
        _append(self.epochs, *values)
        _, step, *rest = values
        for name, value in zip(COLUMNS[2:], rest, strict=True):
            self.board.add_scalar(name, value, int(step))
        self.board.flush()


def _append(path: Path, *values: float) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file).writerow([str(v) if isinstance(v, int) else f"{v:.6g}" for v in values])


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv or losses.csv."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plot_curve(rows: list[dict[str, str]], path: Path) -> None:
    """Training loss and validation accuracy over the epochs, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    loss_axis = figure.add_subplot()
    accuracy_axis = loss_axis.twinx()
    epochs = [int(row["epoch"]) for row in rows]
    loss_axis.plot(epochs, [float(row["train_loss"]) for row in rows], color="tab:blue")
    accuracy_axis.plot(epochs, [float(row["validation_top1"]) for row in rows], color="tab:orange")
    loss_axis.set(xlabel="epoch")
    loss_axis.set_ylabel("training loss (augmented images)", color="tab:blue")
    accuracy_axis.set_ylabel("validation top-1 (%)", color="tab:orange")
    figure.savefig(path, dpi=120)
