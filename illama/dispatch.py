"""The ``illama`` command: ``illama quantize ...`` is the same as ``python quant/ptq.py ...``.

Holds the names of the modules as text and runs one of them, so that this package imports no other.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from importlib import metadata

import illama.cli  # reports Ctrl-C in one line from here on
import illama.bundle

GROUPS = {
    "Quantize a network and compare the results": {
        "quantize": ("quant.ptq", "quantize after training, build engines, report accuracy against latency"),
        "qat": ("quant.qat", "quantization-aware training"),
        "search": ("quant.search", "search formats for each layer within a budget"),
        "sensitivity": ("quant.sensitivity", "measure how much accuracy each layer costs"),
        "schemes": ("quant.list_schemes", "list the shipped schemes"),
        "debug-layers": ("quant.debug_layers", "compare an exported file with PyTorch, layer by layer"),
        "quantize-segmentation": ("quant.ptq_segmentation", "quantize a segmentation network"),
    },
    "Run it": {
        "build": ("deploy.build", "build TensorRT engines, also without a GPU"),
        "predict": ("deploy.predict", "classify images with a bundle, an engine or an ONNX file"),
        "serve": ("deploy.serve", "serve bundles over HTTP and gRPC with Triton"),
        "probe": ("deploy.probe", "check whether a server answers correctly"),
        "lint": ("deploy.lint", "check any ONNX file for what keeps it from loading, or from being accurate or fast"),
        "downgrade": ("deploy.downgrade", "rewrite graphs in an older ONNX opset, for JetPack 5 and 6, for example"),
        "camera": ("deploy.camera", "let the graphs of a bundle take camera frames"),
    },
    "Evaluate it": {
        "benchmark": ("eval.tradeoff", "measure accuracy against latency of any bundles, in a report"),
        "accuracy": ("eval.accuracy", "compare predictions image by image and class by class"),
        "robustness": ("eval.robustness", "accuracy on corrupted images"),
        "out-of-distribution": ("eval.out_of_distribution", "detection of images of other data"),
        "segmentation": ("eval.segmentation", "mean IoU of segmentation networks"),
        "shape-bias": ("eval.shape_bias", "whether shape or texture decides"),
        "attention-rank": ("eval.attention_rank", "rank of the attention matrices"),
        "flops": ("eval.flops", "operations and parameters"),
        "roofline": ("eval.roofline", "attainable speed of a device"),
    },
    "Train a network": {
        "train": ("illama.train", "train a classifier from a recipe"),
        "train-segmentation": ("illama.train_segmentation", "train a segmentation network"),
        "convert": ("illama.convert", "convert a checkpoint to another architecture or number of classes"),
    },
}
COMMANDS = {name: module for commands in GROUPS.values() for name, (module, _) in commands.items()}
_START = """
  illama quantize                                          # the shipped network on Fashion-MNIST: try it
  illama quantize --model timm:vit_small_patch16_224 --checkpoint vit.safetensors --data /data/pictures
  illama COMMAND --help
"""


def main() -> None:
    """Runs the command that the first argument names, with the other arguments."""
    first, *rest = sys.argv[1:] or ["--help"]
    if first in ("-h", "--help"):
        print(_overview())
    elif first == "--version":
        print(f"illama {metadata.version('illama-toolkit')}")
    elif first in COMMANDS:
        illama.bundle.program = f"illama {first}"
        illama.bundle.names |= {module: f"illama {name}" for name, module in COMMANDS.items()}
        sys.argv = [first, *rest]
        runpy.run_module(COMMANDS[first], run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(first, COMMANDS, 1)
        print(f"error: no command {first!r}{f': {near[0]}?' if near else ''} (see illama --help)", file=sys.stderr)
        sys.exit(2)


def _overview() -> str:
    """Returns the text of ``illama --help``: every command, grouped by what it is for."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: illama COMMAND [options]", _START.rstrip()]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<{width}}{about}" for name, (_, about) in commands.items())]
    return "\n".join(lines)
