"""INT8 by ModelOpt in PyTorch: modelopt_int8.py CONFIG, in the folder with vit.safetensors and calibration.npy."""

import sys

import modelopt.torch.quantization as mtq
import numpy as np
import timm
import torch
from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

model = timm.create_model("vit_tiny_patch16_224", num_classes=10, checkpoint_path="vit.safetensors").eval()
images = torch.from_numpy(np.load("calibration.npy"))
model = mtq.quantize(model, getattr(mtq, sys.argv[1]), lambda network: [network(each) for each in images.split(16)])
data, _ = get_onnx_bytes_and_metadata(model, (images[:1],), model_name="modelopt")
OnnxBytes.from_bytes(data).write_to_disk(sys.argv[1])
