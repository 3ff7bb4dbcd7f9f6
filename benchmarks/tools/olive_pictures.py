"""The pictures for olive_int8.json."""

import timm
import torch
from olive.data.registry import Registry

model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))


@Registry.register_dataset()
def transformed_folder(data_dir: str, **_: object) -> torch.utils.data.Dataset[object]:
    return timm.data.create_dataset("", data_dir, transform=lambda image: {"image": transform(image)})
