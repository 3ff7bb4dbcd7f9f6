"""Opens a checkpoint of any kind: an iLLaMA's, timm's or Hugging Face's."""

from __future__ import annotations

from dataclasses import replace

from illama.checkpoints.huggingface import is_huggingface, load_huggingface
from illama.checkpoints.load import Checkpoint, ILLaMACheckpoint, load_checkpoint
from illama.checkpoints.timm_checkpoint import load_timm
from illama.checkpoints.timm_source import HUB_CONFIG, parse_options
from illama.errors import UserError
from illama.models.attention import MaskedNetwork
from illama.options import Head, SourceOptions


def open_checkpoint(options: SourceOptions) -> Checkpoint[MaskedNetwork]:
    """Returns the checkpoint that the options name; raises UserError if it cannot be read, or options do not fit it."""
    path, model, size = options.checkpoint, options.model, options.image_size
    theirs = model == "hf" or (model is None and is_huggingface(path))
    if (model or "").startswith("timm:") and is_huggingface(path):
        raise UserError(f"{path} is a folder of Hugging Face: give --model hf")
    if (model or "").startswith("timm:") or (model is None and not theirs and (path / HUB_CONFIG).exists()):
        name = (model or "").removeprefix("timm:")
        return load_timm(name, path, size, parse_options(options.model_args), options.head)
    if model is not None and not theirs:
        hint = f"did you mean timm:{model.rpartition(':')[2]}?"
        raise UserError(f"--model is timm:NAME, or hf for a folder of Hugging Face, not {model!r}: {hint}")
    if (options.model_args and path.exists()) or isinstance(size, tuple):
        raise UserError("--model-args, and an --image-size that is not square, are for --model timm:NAME")
    if theirs:
        return load_huggingface(path, size, options.head)
    return _with_head(load_checkpoint(path, image_size=size), options.head)


def _with_head(loaded: ILLaMACheckpoint, head: Head) -> ILLaMACheckpoint:
    """Returns an iLLaMA's checkpoint that computes what ``head`` says; UserError if an iLLaMA cannot."""
    if head == "classes" and loaded.model.config.num_classes:
        return loaded
    if head in ("classes", "embedding"):
        raise UserError(f"{loaded.weights} has no such head: give --head none for its pooled features, or tokens")
    pool = loaded.model.config.global_pool or "token"
    loaded.model.reset_classifier(0, "" if head == "tokens" else pool)
    return replace(loaded, classes=())
