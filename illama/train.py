"""Train an iLLaMA from scratch with the soft mask: python illama/train.py

Interrupted or killed, the same command goes on from the last checkpoint and ends with the same weights (to the
bit on a CPU; some of CUDA's kernels add in no fixed order):
every random choice is a function of the seed, the epoch and the image or step, so nothing but the step,
the weights and the optimiser has to be restored.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import time
from collections.abc import Iterator, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from tqdm import tqdm

from illama.accuracy import predict, top1, torch_infer
from illama.bundle import WEIGHTS, Manifest, command_line, write_file, write_folder
from illama.config import ModelConfig
from illama.data import DEBIAN_FASHION_MNIST, ImageData, Preprocessing, Sample, Transform, open_data
from illama.errors import UserError, run_command
from illama.model import ILLaMA
from illama.schedules import SoftMaskSchedule, cosine_with_warmup, soft_mask_alpha

LOG_COLUMNS = ("epoch", "step", "learning_rate", "soft_mask", "train_loss", "validation_top1", "images_per_second")


@dataclass(frozen=True)
class TrainOptions:
    """Train an iLLaMA from scratch.

    Attributes:
        data: fashion-mnist:FOLDER, cifar10:FOLDER, cifar100:FOLDER, or a folder with train/ and val/.
        model: nano, tiny, small, base or large.
        image_size: side length in pixels; the preset's if not given.
        in_channels: 1 (grey) or 3 (RGB); the preset's if not given.
        out: where the checkpoint, the log and at the end the bundle go; an unfinished run there goes on.
        learning_rate: peak of the cosine schedule, for the batch size given (not scaled).
        soft_mask: schedule of alpha; it reaches 0 at soft_mask_epochs.
        crop_padding: random crops of the image padded by this many pixels (for small pictures); 0 takes random
            resized crops (for photographs).
        mixup, cutmix: their alphas, 0 for none; mixup_probability is the share of batches that get either.
        ema_decay: of the exponential moving average of the weights, which is what is kept; 0 keeps the last.
        bfloat16: autocast to bfloat16.
        compile: torch.compile the network (needs a C++ compiler on a CPU).
        checkpoint_steps: steps between two checkpoints.
    """

    data: str = f"fashion-mnist:{DEBIAN_FASHION_MNIST}"
    model: str = "nano"
    image_size: int | None = None
    in_channels: int | None = None
    out: Path = Path("runs/train")
    epochs: int = 60
    batch_size: int = 256
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 3
    soft_mask: SoftMaskSchedule = "linear"
    soft_mask_epochs: float = 10
    drop_path: float = 0.05
    crop_padding: int = 2
    erasing: float = 0.25
    mixup: float = 0.1
    cutmix: float = 1.0
    mixup_probability: float = 0.5
    label_smoothing: float = 0.1
    ema_decay: float = 0.9995
    bfloat16: bool = True
    compile: bool = False
    workers: int = 1
    checkpoint_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.checkpoint_steps < 1:
            raise UserError("--epochs and --checkpoint-steps must be at least 1")
        if self.batch_size < 2 or self.batch_size % 2:
            raise UserError("--batch-size must be even, since mixup pairs images, and at least 2")
        for name in ("erasing", "mixup_probability", "label_smoothing", "ema_decay", "drop_path"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in 0..1")


class Augmented(Dataset[tuple[Tensor, int]]):
    """Augmented images, addressed by (epoch, index); the pair alone decides the augmentation."""

    def __init__(self, images: Dataset[Sample], transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        seed_everything(self.seed, *key)
        image, label = self.images[key[1]]
        return self.transform(image), label


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys from ``start`` to ``stop`` steps, each epoch in an order of its own."""

    def __init__(self, images: int, batch: int, seed: int, start: int, stop: int) -> None:
        self.images, self.batch, self.seed, self.start, self.stop = images, batch, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.images // self.batch
        for step in range(self.start, self.stop):
            epoch, at = divmod(step, per_epoch)
            if at == 0 or step == self.start:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
            yield [(epoch, int(i)) for i in order[at * self.batch : (at + 1) * self.batch]]


def seed_everything(*key: int) -> None:
    """Seed torch's and numpy's global generators from a tuple of numbers."""
    state = np.random.SeedSequence(key).generate_state(2)
    torch.random.default_generator.manual_seed(int(state[0]))  # torch.manual_seed is ten times slower
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(int(state[0]))
    np.random.seed(state[1])


@dataclass
class Run:
    """One training run in progress."""

    options: TrainOptions
    data: ImageData
    preprocessing: Preprocessing
    model: ILLaMA
    average: AveragedModel
    optimizer: torch.optim.AdamW
    step: int = 0
    loss_sum: float = 0.0

    @property
    def checkpoint(self) -> Path:
        return self.options.out / "checkpoint.pt"

    def save(self) -> None:
        content = {
            "step": self.step,
            "loss_sum": self.loss_sum,
            "options": _identity(self.options),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        buffer = io.BytesIO()  # torch.save to a path hides why a disk would not take it
        torch.save(content, buffer)
        with write_file(self.checkpoint) as draft:
            draft.write_bytes(buffer.getbuffer())

    def restore(self) -> None:
        """Go on from the checkpoint in ``out``, if there is one; UserError if it is another run's."""
        if not self.checkpoint.exists():
            return
        try:
            content = torch.load(self.checkpoint, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.checkpoint} is damaged: delete it to start anew") from error
        if content["options"] != _identity(self.options):
            raise UserError(f"{self.options.out} holds a run with other options: choose another --out or delete it")
        self.step, self.loss_sum = content["step"], content["loss_sum"]
        self.model.load_state_dict(content["model"])
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])


def start_run(options: TrainOptions) -> Run:
    """Build the data, the network and the optimiser, and restore them from ``options.out``."""
    data = open_data(options.data)
    overrides = {"image_size": options.image_size, "in_channels": options.in_channels}
    overrides["num_classes"] = len(data.classes)
    config = ModelConfig.preset(options.model, **{name: value for name, value in overrides.items() if value})
    seed_everything(options.seed)
    model = ILLaMA(config, options.drop_path).to("cuda" if torch.cuda.is_available() else "cpu")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay))
    optimizer = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.learning_rate, fused=True)
    run = Run(options, data, data.preprocessing(config.image_size, config.in_channels), model, average, optimizer)
    run.restore()
    return run


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels only: none on norms, biases, position embedding, class token."""
    named = list(model.named_parameters())
    plain = {name for name, p in named if p.ndim == 1 or name in ("pos_embed", "cls_token")}
    return [
        {"params": [p for name, p in named if name not in plain], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
    ]


def make_mixup(options: TrainOptions, classes: int) -> Mixup:
    """timm's mixup, cutmix and label smoothing; with both alphas 0, label smoothing alone."""
    off = options.mixup == options.cutmix == 0
    return Mixup(
        mixup_alpha=1.0 if off else options.mixup,
        cutmix_alpha=options.cutmix,
        prob=0.0 if off else options.mixup_probability,
        label_smoothing=options.label_smoothing,
        num_classes=classes,
    )


def training_transform(options: TrainOptions, preprocessing: Preprocessing) -> Transform:
    """Random crop, flip and erasing around the evaluation's normalisation."""
    size = preprocessing.image_size
    if options.crop_padding:
        crop = [v2.Resize([size, size]), v2.RandomCrop(size, padding=options.crop_padding)]
    else:
        crop = [v2.RandomResizedCrop(size)]
    augment = [*crop, v2.RandomHorizontalFlip()]
    return v2.Compose([preprocessing.transform(augment), v2.RandomErasing(options.erasing)])


def fit(run: Run) -> None:
    """Train to the last step, with a checkpoint every ``checkpoint_steps`` and a log row every epoch."""
    options, model = run.options, run.model
    images, validation = run.data.training()
    count = len(cast(Sized, images))
    per_epoch = count // options.batch_size
    if per_epoch == 0:
        raise UserError(f"{count} training images are fewer than one batch of {options.batch_size}")
    total = per_epoch * options.epochs
    batches = ShuffledBatches(count, options.batch_size, options.seed, run.step, total)
    dataset = Augmented(images, training_transform(options, run.preprocessing), options.seed)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=options.workers)
    mixup = make_mixup(options, model.config.num_classes)
    forward = torch.compile(model) if options.compile else model
    log = Log(options.out, run.step)
    started, first = time.perf_counter(), run.step
    with tqdm(total=total, initial=run.step, unit="step", smoothing=0.05, disable=None) as bar:
        for batch, labels in loader:
            run.loss_sum += training_step(run, forward, mixup, batch, labels, per_epoch)
            run.step += 1
            bar.update()
            if run.step % per_epoch == 0:
                speed = (run.step - first) * options.batch_size / (time.perf_counter() - started)
                bar.set_postfix(log.write(run, validation, run.loss_sum / per_epoch, run.step // per_epoch, speed))
                run.loss_sum = 0.0
            if run.step % options.checkpoint_steps == 0 or run.step == total:
                run.save()


def training_step(run: Run, forward: Any, mixup: Mixup, images: Tensor, labels: Tensor, steps_per_epoch: int) -> float:
    """Forward, backward, optimiser and moving average for one batch; the loss as a number."""
    options, device = run.options, run.model.cls_token.device
    seed_everything(options.seed, run.step)
    images, targets = mixup(images.to(device), labels.to(device))
    run.model.train()
    run.model.soft_mask = soft_mask_alpha(options.soft_mask, run.step, int(options.soft_mask_epochs * steps_per_epoch))
    rate = cosine_with_warmup(run.step, options.epochs * steps_per_epoch,
                              int(options.warmup_epochs * steps_per_epoch), options.learning_rate)  # fmt: skip
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
        logits = forward(images)
    loss = F.cross_entropy(logits.float(), targets)
    if not torch.isfinite(loss):
        raise UserError(f"the loss is not finite at step {run.step}: lower --learning-rate")
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.average.update_parameters(run.model)
    return loss.item()


class Log:
    """One row per epoch, in log.csv and for TensorBoard; rows after the resumed step are dropped."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "log.csv"
        rows = [row for row in read_log(self.path) if int(row["step"]) <= step] if self.path.exists() else []
        with write_file(self.path) as draft, draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, run: Run, validation: Dataset[Sample], loss: float, epoch: int, speed: float) -> dict[str, str]:
        """Evaluate the averaged weights on the validation images and log the epoch; a summary for the bar."""
        accuracy = evaluate(run, validation)
        rate = run.optimizer.param_groups[0]["lr"]
        values = (epoch, run.step, rate, run.model.soft_mask, loss, accuracy, speed)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([str(v) if isinstance(v, int) else f"{v:.6g}" for v in values])
        for name, value in list(zip(LOG_COLUMNS, values, strict=True))[2:]:
            self.board.add_scalar(name, value, run.step)
        self.board.flush()
        return {"epoch": str(epoch), "loss": f"{loss:.3f}", "val": f"{accuracy:.2f}%"}


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log.csv."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def evaluate(run: Run, split: Dataset[Sample]) -> float:
    """Top-1 in percent of the averaged weights."""
    models = {"average": torch_infer(run.average.module.eval())}
    logits, labels = predict(models, split, run.preprocessing.transform())
    return top1(logits["average"], labels)


def write_bundle(run: Run) -> Path:
    """The finished run as a bundle: averaged weights, manifest with test accuracy, log and curve."""
    test = run.data.test()
    config: ModelConfig = run.model.config
    metrics = {"test_top1": evaluate(run, test), "test_images": len(cast(Sized, test)), "epochs": run.options.epochs}
    manifest = Manifest(command_line(), config.to_dict(), asdict(run.preprocessing), list(run.data.classes),
                        run.options.seed, metrics=metrics)  # fmt: skip
    with write_folder(run.options.out / "bundle") as draft:
        weights = {name: value.contiguous().cpu() for name, value in run.average.module.state_dict().items()}
        (draft / WEIGHTS).write_bytes(safetensors.torch.save(weights))
        rows = read_log(run.options.out / "log.csv")
        (draft / "log.csv").write_text((run.options.out / "log.csv").read_text())
        plot_curve(rows, draft / "curve.png")
        manifest.write(draft)
    return run.options.out / "bundle"


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


def _identity(options: TrainOptions) -> str:
    """What must not change between a run and its continuation."""
    free = {"out", "workers", "checkpoint_steps"}
    return json.dumps({name: value for name, value in asdict(options).items() if name not in free}, default=str)


def main(options: TrainOptions) -> None:
    options = replace(options, out=options.out.resolve())
    run = start_run(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror}; choose another --out") from error
    fit(run)
    bundle = write_bundle(run)
    metrics = Manifest.read(bundle).metrics
    print(f"top-1 {metrics['test_top1']:.2f}% on {metrics['test_images']} test images; bundle in {bundle}")


if __name__ == "__main__":
    run_command(TrainOptions, main)
