"""A training run: network, optimizer and moving average. A resumed run gives the same result, bit for bit."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset

from illama.atomic_write import write_file
from illama.checkpoints.tensor_files import check_tensors, read_pickle
from illama.data.augmentation import Augmented, MicroBatches, make_mixup, training_transform
from illama.data.datasets import ImageData, Sample
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.inference import predict, torch_infer
from illama.manifest import Metric
from illama.models.attention import MaskedNetwork
from illama.nearest_neighbors import Classifier, as_it_is, classified
from illama.progress import Activity
from illama.randomness import isolated_randomness
from illama.structured_files import parse_json
from illama.training.distributed import Processes, gradient_sync
from illama.training.log import Log
from illama.training.recipe import ClassifierOptions, TrainingOptions
from illama.training.schedules import cosine_with_warmup, soft_mask_alpha

CHECKPOINT = "checkpoint.pt"  # file name in a run's folder
_WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
_LOGGED_EVERY = 10  # steps; reading the loss makes a GPU wait

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images (B, C, H, W), logits (B, classes) float32, targets (B, classes)) -> scalar."""
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images (B, C, H, W), labels) of a micro-batch -> (images for the network, targets for the loss)."""
Groups = Callable[[TrainingOptions, MaskedNetwork], list[dict[str, Any]]]
"""(recipe, network) -> the optimizer's parameter groups."""


def label_loss(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross entropy with the mixed and smoothed labels."""
    return F.cross_entropy(logits, targets)


def parameter_groups(recipe: TrainingOptions, model: MaskedNetwork) -> list[dict[str, Any]]:
    """Returns timm's parameter groups; norms, biases, position embedding and class token have no weight decay.

    The learning rate of a group is the schedule's value times its ``lr_scale``: ``layer_decay`` to the power of the
    number of layers above it.
    """
    spared = model.no_weight_decay()
    if recipe.layer_decay == 1:
        return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared)
    return param_groups_layer_decay(model, recipe.weight_decay, spared, layer_decay=recipe.layer_decay)


@dataclass(frozen=True)
class Task:
    """What a network is trained for.

    Attributes:
        data: images and labels.
        preprocessing: preprocessing for the evaluation.
        inputs: path of each file of the initial weights -> its SHA-256.
        loss: loss function.
        groups: function that returns the optimizer's parameter groups.
        classifier: computes the logits of the evaluation from the network's output, if it is features.
    """

    data: ImageData
    preprocessing: Preprocessing
    inputs: Mapping[str, str] = field(default_factory=dict)
    loss: Loss = label_loss
    groups: Groups = parameter_groups
    classifier: Classifier = as_it_is


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: number of finished optimizer steps.
        loss_sum: sum of the losses of the epoch's logged steps.
        loss_share: this process's share of the losses since the last log, float64 on the device of the process.
        steps_unlogged: number of steps since the last log.
    """

    step: int
    loss_sum: float
    loss_share: Tensor
    steps_unlogged: int = 0


class Run:
    """A training run of a classifier. Subclasses for other tasks override its methods.

    Args:
        recipe: options of the run.
        model: an ILLaMA or another network with a soft mask, such as one of illama.models.timm_vit.
        processes: the processes of the run.

    Attributes:
        score_name: name of the score that :meth:`score` returns.
        model: the network, on the device of the process, and sharded over the processes if the recipe says so.
        images: training images, without those held out for validation.
        validation: images of the training split that are held out for validation.
        average: moving average of the weights; None without one.
        wrapped: the network that averages gradients over the processes.
        forward: ``wrapped``, compiled if the recipe says so.

    Raises:
        UserError: the recipe's folder has a checkpoint of another run.
    """

    score_name: ClassVar[Metric] = "top1"

    def __init__(self, recipe: TrainingOptions, task: Task, model: MaskedNetwork, processes: Processes) -> None:
        device = processes.device
        self.recipe, self.task, self.processes, self.model = recipe, task, processes, model.to(device)
        self.progress = Progress(0, 0.0, torch.zeros((), dtype=torch.float64, device=device))
        self.images, self.validation = task.data.training()
        decay = recipe.ema_decay
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        if recipe.sharded:  # after the copy for the average, and before the optimizer, which holds the parameters
            for each in dict.fromkeys((self.model, self.kept)):
                self.processes.shard(each, cast(nn.ModuleList, each.blocks))
        self.optimizer = make_optimizer(recipe, self.model, task.groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.autocast == "float16")
        self.wrapped = self.processes.wrap(self.model)
        self.forward: Any = torch.compile(self.wrapped) if recipe.compile else self.wrapped
        self.restore()

    def augmented(self) -> Augmented:
        """Returns the augmented training images."""
        transform = training_transform(cast(ClassifierOptions, self.recipe), self.task.preprocessing)
        return Augmented(self.images, transform, self.recipe.seed)

    def mixer(self) -> Mix:
        """Returns the function that applies mixup to a micro-batch."""
        return make_mixup(cast(ClassifierOptions, self.recipe), len(self.task.data.classes))

    def score(self, split: Dataset[Sample]) -> float:
        """Returns the score of the kept weights with the hard mask, in percent. Every process must call it."""
        model = self.kept.eval()
        model.soft_mask = 0.0
        own, counted = self.processes.share(len(cast(Sized, split)))
        logits, labels = predict(
            {"kept": classified(torch_infer(model), self.task.classifier)},
            Subset(split, own),
            self.task.preprocessing.transform(),
            workers=self.recipe.workers,
            progress=self.processes.main,
        )
        right, seen = self.processes.sum(float((logits["kept"].argmax(1) == labels)[:counted].sum()), counted)
        return 100 * right / seen

    @property
    def kept(self) -> MaskedNetwork:
        """Network that is evaluated and written to the bundle: the moving average if there is one, else the model."""
        return cast(MaskedNetwork, self.average.module) if self.average else self.model

    @property
    def checkpoint(self) -> Path:
        return self.recipe.out / CHECKPOINT

    @property
    def identity(self) -> str:
        """Options, classes and inputs that must be the same when the run is resumed, as JSON."""
        free = {"recipe", "out", "workers", "checkpoint_steps", "fsdp"}
        facts = {name: value for name, value in asdict(self.recipe).items() if name not in free}
        facts |= {
            "classes": self.task.data.classes,
            "images": len(cast(Sized, self.images)),
            "inputs": dict(self.task.inputs),
        }
        return json.dumps(facts, default=str)

    def kept_weights(self) -> dict[str, Tensor]:
        """Returns the state dict of :attr:`kept`, unsharded and on the CPU. Every process must call it."""
        return cast(dict[str, Tensor], sharded.get_model_state_dict(self.kept, options=_WHOLE))

    def save(self) -> None:
        """Writes the checkpoint atomically, with unsharded weights. Every process must call it."""
        model, optimizer = sharded.get_state_dict(self.model, self.optimizer, options=_WHOLE)
        content = {
            "step": self.progress.step,
            "loss_sum": self.progress.loss_sum,
            "identity": self.identity,
            "model": model,
            "optimizer": optimizer,
            "average": self.kept_weights() if self.average else {},
            "scaler": self.scaler.state_dict(),
        }
        if self.processes.main:
            buffer = io.BytesIO()  # with a path, torch.save hides the reason of a failed write
            torch.save(content, buffer)
            with write_file(self.checkpoint) as draft:
                draft.write_bytes(buffer.getbuffer())

    def restore(self) -> None:
        """Loads the checkpoint in ``out``, if there is one; raises UserError if it belongs to another run."""
        if not self.checkpoint.exists():
            return
        content = read_pickle(self.checkpoint)
        stored, path = content.get("identity"), str(self.checkpoint)
        facts = parse_json(stored, dict[str, Any], path) if isinstance(stored, str) else None
        if facts != json.loads(self.identity):
            raise UserError(
                f"{self.recipe.out} contains a run with other options, images or initial weights: "
                "choose another --out or delete it"
            )
        try:
            self._load(content)
        except Exception as error:  # damaged values can raise anything in PyTorch
            raise UserError(f"{self.checkpoint} is damaged: delete it to start again") from error

    def _load(self, content: dict[str, Any]) -> None:
        check_tensors(content["model"], self.checkpoint)
        check_tensors(content["average"], self.checkpoint)
        self.progress.step, self.progress.loss_sum = int(content["step"]), float(content["loss_sum"])
        states = {"model_state_dict": content["model"], "optim_state_dict": content["optimizer"]}
        sharded.set_state_dict(self.model, self.optimizer, **states, options=_WHOLE)
        if self.average:
            sharded.set_model_state_dict(self.kept, content["average"], options=_WHOLE)
            self.average.n_averaged += self.progress.step
        self.scaler.load_state_dict(content["scaler"])


def make_optimizer(
    recipe: TrainingOptions, model: MaskedNetwork, groups: Groups = parameter_groups
) -> torch.optim.Optimizer:
    """Returns the recipe's optimizer; raises UserError if it is not an optimizer of timm."""
    fused: dict[str, Any] = {"fused": True} if recipe.optimizer == "adamw" and not recipe.sharded else {}
    try:
        return create_optimizer_v2(
            groups(recipe, model), opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=0.0, **fused
        )
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(
            f"--optimizer {recipe.optimizer!r} is not in timm or cannot run here: choose another, such as adamw"
        ) from error


def fit(run: Run) -> None:
    """Trains to the last step, with a checkpoint every ``checkpoint_steps`` steps and a log row every epoch."""
    recipe, processes = run.recipe, run.processes
    count = len(cast(Sized, run.images))
    stop = count // recipe.batch_size * recipe.epochs
    batches = MicroBatches(count, recipe, run.progress.step, stop, processes.rank, processes.count)
    per_epoch = batches.steps_per_epoch
    cuda = processes.device.type == "cuda"
    loader = iter(DataLoader(run.augmented(), batch_sampler=batches, num_workers=recipe.workers, pin_memory=cuda))
    mix = run.mixer()
    log = Log(recipe.out, run.progress.step, run.score_name) if processes.main else None
    started, first = time.perf_counter(), run.progress.step
    with Activity("train", "step", stop, run.progress.step, processes.main) as bar:
        while run.progress.step < stop:
            training_step(run, mix, loader, batches.parts, per_epoch)
            bar.update()
            saving = run.progress.step % recipe.checkpoint_steps == 0 or run.progress.step == stop
            ending = run.progress.step % per_epoch == 0
            if saving or ending or run.progress.step % _LOGGED_EVERY == 0:
                log_loss(run, log)
            if ending:
                speed = (run.progress.step - first) * recipe.batch_size / (time.perf_counter() - started)
                bar.note = end_epoch(run, log, per_epoch, speed)
            if saving:
                run.save()


def training_step(run: Run, mix: Mix, loader: Iterator[Any], parts: range, steps_per_epoch: int) -> None:
    """Runs one optimizer step: forward and backward of every micro-batch, then the update of weights and average."""
    recipe, device = run.recipe, run.processes.device
    run.model.train()
    step = run.progress.step
    run.model.soft_mask = soft_mask_alpha(recipe.soft_mask, step, int(recipe.soft_mask_epochs * steps_per_epoch))
    warmup = int(recipe.warmup_epochs * steps_per_epoch)
    rate = cosine_with_warmup(step, recipe.epochs * steps_per_epoch, warmup, recipe.learning_rate)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    for part in parts:
        images, labels = next(loader)
        with (
            isolated_randomness(recipe.seed, run.progress.step, part),
            gradient_sync(run.wrapped, now=part == parts[-1]),
        ):
            images, targets = mix(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            dtype = getattr(torch, recipe.dtype_on(device.type))
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = run.forward(images)
            loss = run.task.loss(images, logits.float(), targets)
            run.scaler.scale(loss / len(parts)).backward()
        run.progress.loss_share += loss.detach() / recipe.parts
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.average:
        run.average.update_parameters(run.model)
    run.progress.step += 1
    run.progress.steps_unlogged += 1


def log_loss(run: Run, log: Log | None) -> None:
    """Adds the losses since the last call to the epoch's sum and logs their mean; UserError if they are not finite."""
    (total,) = run.processes.sum(run.progress.loss_share.item())
    run.progress.loss_share.zero_()
    if not math.isfinite(total):
        raise UserError(f"the loss is not finite at step {run.progress.step}: lower --learning-rate")
    run.progress.loss_sum += total
    if log:
        log.write_loss(run.progress.step, total / run.progress.steps_unlogged)
    run.progress.steps_unlogged = 0


def end_epoch(run: Run, log: Log | None, per_epoch: int, speed: float) -> str:
    """Evaluates the kept weights on the validation images, logs the epoch, and returns a summary to display."""
    epoch, rate = run.progress.step // per_epoch, run.optimizer.param_groups[-1]["lr"]
    soft_mask = run.model.soft_mask
    loss, run.progress.loss_sum = run.progress.loss_sum / per_epoch, 0.0
    score = run.score(run.validation)
    if log:
        log.write_epoch(epoch, run.progress.step, rate, soft_mask, loss, score, speed)
    return f"epoch {epoch}, loss {loss:.3g}, val {score:.2f}%"
