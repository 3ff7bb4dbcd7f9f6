"""Options of training a segmentation network. Imports no large library, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from illama.options import BatchSize, Count, Fraction, NotNegative
from illama.training.recipe import NetworkOptions, TrainingOptions
from illama.training.schedules import SoftMaskSchedule


@dataclass(frozen=True)
class SegmentationOptions(NetworkOptions, TrainingOptions):
    """Train a UperNet, on an iLLaMA or another ViT with the weights of --init, on a folder in ADE20K's layout.

    Writes the network to OUT/bundle/, a checkpoint to continue from to OUT/checkpoint.pt, and logs.

    Image size, optimizer, learning rate and weight decay are the paper's. The paper gives no batch size, epochs or
    warm-up: those here amount to the usual 160,000 steps of 16 images, of which 1,500 are warm-up, on ADE20K.

    Attributes:
        data: path to a folder in the layout of ADEChallengeData2016 (docs/segmentation.md).
        model: model size: nano, tiny, small, base or large; or timm:NAME for a ViT of timm, hf for one of transformers.
        init: initial weights of the backbone: a bundle, a .safetensors file or a released .pth file; of a ViT of timm
            its file or folder, of one of transformers its folder. Position embeddings are resized.
        model_args: other options of timm.create_model, NAME=VALUE,...
        decoder_channels: number of channels of every feature map in the decoder.
    """

    data: str = ""
    out: Path = Path("runs/segmentation")
    epochs: Count = 127
    batch_size: Count = 16
    micro_batch: BatchSize = 4
    learning_rate: NotNegative = 6e-5
    weight_decay: NotNegative = 0.01
    warmup_epochs: NotNegative = 1.2
    soft_mask: SoftMaskSchedule = "none"
    soft_mask_epochs: NotNegative = 0
    label_smoothing: Fraction = 0.0
    model_args: str = ""
    decoder_channels: Count = 256
