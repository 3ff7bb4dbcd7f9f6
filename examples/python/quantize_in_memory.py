"""Quantize a timm ViT that is in memory, build an engine, and compare it with the float network:

python examples/python/quantize_in_memory.py /data/pictures    # with train/CLASS/ and val/CLASS/
"""

import sys

import timm
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from deploy import build
from eval import benchmark
from quant import quantize

folder = sys.argv[1]
classes = ImageFolder(f"{folder}/train").classes
model = timm.create_model("vit_tiny_patch16_224", num_classes=len(classes), img_size=64)  # yours, with its weights
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model, {"input_size": (3, 64, 64)}))
loader = DataLoader(ImageFolder(f"{folder}/train", transform), batch_size=32, shuffle=True)

bundle = quantize(model, loader, scheme="int8", out="runs/example", classes=classes)
engine = build(bundle, targets=["sm89"])
report = benchmark(["runs/example"], data=folder, out="runs/example-report")
print(f"{engine}, and {len(report.rows)} rows in runs/example-report/report.html")
