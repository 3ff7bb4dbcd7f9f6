"""The manifest of a bundle: typed facts about what it contains and how it was made.

``manifest.json`` has format 2. Files of format 1 are read too; :meth:`Manifest.write` writes format 2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len

from illama.bundle import FEATURES, MANIFEST, OUTPUT, GoldenImages, NetworkKind, command_line, package_versions
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.options import Count, SourceOptions
from illama.structured_files import parse_json, read_json

TRAINED = "trained"  # key of the score of a training run
Metric = Literal["top1", "miou"]
NoTensorRT = Literal["pytorch", "activations", "weights", "blocks"]
Emulated = Literal["fp8", "blocks", "6-bit", "4-bit activations"]
HalfDtype = Literal["float16", "bfloat16"]
WideDtype = Literal["float32", "bfloat16"]
LARGEST: dict[HalfDtype, float] = {"float16": 65504.0, "bfloat16": (2 - 2**-7) * 2.0**127}  # finite values
NO_TENSORRT: dict[NoTensorRT, str] = {
    "pytorch": "it runs inside PyTorch",
    "activations": "TensorRT needs symmetric 8-bit activations; only a layer's input can have its zero point folded",
    "weights": "TensorRT multiplies 4-bit weights by half-precision inputs only, and no weights of 6 bits",
    "blocks": "TensorRT multiplies blocks by blocks of the same format, or NVFP4 weights by half-precision inputs",
}
EMULATED: dict[Emulated, str] = {
    "fp8": "no CPU multiplies FP8, and ONNX Runtime only emulates it",
    "blocks": "no CPU multiplies formats with block scales, and ONNX Runtime only emulates it",
    "6-bit": "6-bit formats are simulated",
    "4-bit activations": "no CPU multiplies 4-bit activations, and ONNX Runtime only emulates it",
}


@dataclass(frozen=True)
class Provenance:
    """How a bundle was made.

    Attributes:
        command: command line that wrote it.
        seed: seed of the command.
        inputs: path of each input file -> its SHA-256.
        source: options that open the same checkpoint and images again; None if it was not quantized.
        versions: package -> its version.
    """

    command: str = field(default_factory=command_line)
    seed: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    source: SourceOptions | None = None
    versions: Mapping[str, str] = field(default_factory=package_versions)


@dataclass(frozen=True)
class LayerFormats:
    """Formats of a layer's weight and input, as text; the weight's is empty for an operand of attention."""

    layer: str
    weight: str
    input: str


@dataclass(frozen=True)
class Quantization:
    """How a network was quantized.

    Attributes:
        scheme: name of the scheme; the scheme itself is in the bundle's ``scheme.yaml``.
        layers: formats of the layers; equally quantized blocks share an entry.
        no_tensorrt: why there is no graph for TensorRT, a key of :data:`NO_TENSORRT`; None if there is one.
        emulated: why its latency on a CPU is meaningless, a key of :data:`EMULATED`; None if it is not.
    """

    scheme: str
    layers: tuple[LayerFormats, ...] = ()
    no_tensorrt: NoTensorRT | None = None
    emulated: Emulated | None = None


@dataclass(frozen=True)
class LayerRange:
    """How much of the range of half precision a layer uses.

    Attributes:
        layer: the module.
        dtype: its dtype in the graph for TensorRT.
        largest: the largest magnitude of its results on calibration images, computed in float32.
        weight: the largest magnitude of its weights; None without weights in half precision.
    """

    layer: str
    dtype: HalfDtype
    largest: float
    weight: float | None = None

    @property
    def headroom(self) -> float:
        """The largest finite value of the dtype divided by ``largest``."""
        return LARGEST[self.dtype] / self.largest if self.largest else math.inf


@dataclass(frozen=True)
class NumericRange:
    """The range of half precision that the graph for TensorRT uses.

    Attributes:
        images: number of calibration images.
        layers: the layers in half precision, in the order of computation.
        misfits: layers whose values float16 cannot represent, because of which the graph is not all in float16.
        dtype: dtype of the graph, but for ``wide``.
        wide: module -> dtype in which it is computed instead.
    """

    images: int
    layers: tuple[LayerRange, ...]
    misfits: tuple[str, ...] = ()
    dtype: HalfDtype = "float16"
    wide: Mapping[str, WideDtype] = field(default_factory=dict)

    def __str__(self) -> str:
        """A sentence on the layers that do not fit into float16; an empty string if all do."""
        if not self.misfits:
            return ""
        names = ", ".join(self.misfits[:3]) + (f" and {len(self.misfits) - 3} more" if len(self.misfits) > 3 else "")
        kept = ", ".join(f"{module} is in {dtype}" for module, dtype in self.wide.items())
        whole = "the whole graph is in bfloat16" if self.dtype == "bfloat16" else "no other precision is finite either"
        return f"float16 cannot represent the values of {names}: {kept or whole}"


@dataclass(frozen=True)
class Drop:
    """Points of accuracy lost (negative: gained), with a 95% interval."""

    points: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        """Whether the interval shows no difference."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{self.points:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


@dataclass(frozen=True)
class Scores:
    """Scores on a test split.

    Attributes:
        metric: top1 (accuracy; of features, that of their nearest neighbors) or miou (mean intersection over union), in
            percent.
        images: number of test images.
        values: name of what was evaluated -> its score. ``trained`` is the network after a training run; a bundle of
            quantization-aware training has ``fp32``, ``ptq``, ``qat`` and the exported files.
        drops: name -> accuracy drop from ``fp32``.
        epochs: number of training epochs.
        machine: machine of a training run (:func:`illama.hardware.describe_machine`).
    """

    metric: Metric
    images: int
    values: Mapping[str, float]
    drops: Mapping[str, Drop] = field(default_factory=dict)
    epochs: int | None = None
    machine: Mapping[str, str | int | float | None] | None = None


@dataclass(frozen=True)
class Manifest:
    """Metadata of a bundle, stored as ``manifest.json``.

    Attributes:
        network: kind of the network that ``config`` describes.
        config: its configuration (:class:`illama.ModelConfig`, for example) as a dict.
        preprocessing: how an image becomes the network's input.
        classes: class names in the order of the logits; empty if the output is features.
        provenance: how the bundle was made.
        quantization: None if the network was not quantized.
        scores: None if it was not evaluated.
        frame: (height, width, channels) of the uint8 frames that graphs with preprocessing take; None for others.
        numeric_range: of the graph for TensorRT; None if there is none, or it was not measured.
        golden_answers: the images of its golden answers (:mod:`illama.golden_answers`); None if it was written before
            there were any.
        features: shape of the output for an image, of a network without a classifier; None for one with classes.
        stream: reserved for later versions; this one keeps it unchanged.
        format: version of this format.
    """

    network: NetworkKind
    config: Mapping[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    provenance: Provenance = field(default_factory=Provenance)
    quantization: Quantization | None = None
    scores: Scores | None = None
    frame: tuple[int, int, int] | None = None
    numeric_range: NumericRange | None = None
    golden_answers: GoldenImages | None = None
    features: Annotated[tuple[Count, ...], Len(1)] | None = None
    stream: Mapping[str, Any] | None = None
    format: Literal[2] = 2

    def __post_init__(self) -> None:
        if (count := self.config.get("num_classes", len(self.classes))) != len(self.classes):
            raise UserError(f"the network has {count!s:.20} classes, and {len(self.classes)} are named")

    @property
    def output(self) -> str:
        """Name of the graphs' output."""
        return FEATURES if self.features else OUTPUT

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output for an image, of a network for classification or features."""
        return self.features or (len(self.classes),)

    @property
    def data(self) -> str:
        """The data set that it was made with, as :func:`illama.data.datasets.open_data` takes it."""
        source = self.provenance.source or SourceOptions()
        return source.data

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json`` into a bundle's folder, without the sections that are None."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2, default=str) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of a bundle; raises UserError if it is missing, damaged or of another format."""
        path = folder / MANIFEST
        if not path.exists():
            if inner := min(folder.glob(f"*/{MANIFEST}"), default=None):
                raise UserError(f"{folder} is a folder of bundles: give one of them, such as {inner.parent}")
            found = f"is not a bundle: it has no {MANIFEST}" if folder.exists() else "does not exist"
            raise UserError(f"{folder.absolute()} {found}; python quant/ptq.py makes bundles")
        values = read_json(path, dict[str, Any])
        try:
            values = _from_format_1(values) if values.get("format") == 1 else values
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is damaged: make the bundle again") from error
        return parse_json(json.dumps(values), cls, str(path))


def is_bundle(folder: Path) -> bool:
    """Returns whether a folder is a bundle."""
    try:
        return bool(Manifest.read(folder))
    except UserError:
        return False


def _from_format_1(old: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a manifest of format 1, which kept most facts in ``metrics`` under keys of each command."""
    metrics, config = old["metrics"], old["config"]
    kind = "segmentation" if "decoder_channels" in config else "timm" if "name" in config else "illama"
    provenance = {"command": old["made_by"], **{key: old[key] for key in ("seed", "inputs", "versions")}}
    return {
        "network": kind,
        "config": config,
        "preprocessing": _preprocessing_of_format_1(old["preprocessing"]),
        "classes": old["classes"],
        "provenance": {**provenance, "source": metrics.get("source")},
        "quantization": _quantization_of_format_1(metrics) if "scheme" in metrics else None,
        "scores": _scores_of_format_1(metrics) if "test_images" in metrics else None,
        "frame": metrics.get("frame"),
        "format": 2,
    }


def _preprocessing_of_format_1(old: Mapping[str, Any]) -> dict[str, Any]:
    """Without exif and class_order, the writer had neither, and behaved as ``ignore`` and ``words``."""
    rest = {key: value for key, value in old.items() if key != "image_size"}
    return {"exif": "ignore", "class_order": "words", **rest, "size": [old["image_size"], old["image_size"]]}


def _quantization_of_format_1(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The reasons were stored as sentences, whose wording varied."""
    no_tensorrt, not_timed = metrics.get("no_tensorrt"), metrics.get("not_timed")
    return {
        "scheme": metrics["scheme"],
        "layers": [dict(zip(("layer", "weight", "input"), row, strict=True)) for row in metrics.get("layers", [])],
        "no_tensorrt": _reason(no_tensorrt, {"PyTorch": "pytorch", "weights": "weights", "": "activations"}),
        "emulated": _reason(not_timed, {"FP8": "fp8", "4-bit": "4-bit activations", "": "6-bit"}),
    }


def _reason(sentence: str | None, keys: Mapping[str, str]) -> str | None:
    """Returns the key of the first word that is in a sentence; None without a sentence."""
    return next(key for word, key in keys.items() if word in sentence) if sentence else None


def _scores_of_format_1(metrics: Mapping[str, Any]) -> dict[str, Any]:
    metric = "miou" if "test_miou" in metrics else "top1"
    ends = {f"_{metric}": "values", "_drop": "drops"}
    found: dict[str, dict[str, Any]] = {"values": {}, "drops": {}}
    for key, value in metrics.items():
        for end, place in ends.items():
            if key.endswith(end):
                found[place][TRAINED if key == f"test{end}" else key.removesuffix(end)] = value
    rest = {key: metrics.get(key) for key in ("epochs", "machine")}
    return {"metric": metric, "images": metrics["test_images"], **found, **rest}
