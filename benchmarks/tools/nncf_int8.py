"""INT8 by NNCF, in the folder with vit.onnx and pictures/flat."""

from pathlib import Path

import nncf
import onnx
import timm
from PIL import Image

model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
pictures = nncf.Dataset(
    sorted(Path("pictures/flat").glob("*.png")),
    lambda path: {"image": transform(Image.open(path).convert("RGB"))[None].numpy()},
)
quantized = nncf.quantize(onnx.load("vit.onnx"), pictures, model_type=nncf.ModelType.TRANSFORMER)
onnx.save(quantized, "nncf-int8.onnx")
