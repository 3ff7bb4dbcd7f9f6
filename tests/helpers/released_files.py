"""Files in the format of the released code, with random weights."""

import argparse

import torch

# File name, width, heads, SwiGLU's hidden width, image size: as published (arXiv 2404.06773, Table 13).
RELEASED = [
    ("illama-tiny-in1k-75.0.pth", 192, 3, 512, 224),
    ("illama-small-in1k-79.9.pth", 384, 6, 1024, 224),
    ("illama-base-in1k-81.6.pth", 768, 12, 2048, 224),
    ("illama-base-in1k-384-83.0.pth", 768, 12, 2048, 384),
    ("illama-base-in21kin1k-224-83.6.pth", 768, 12, 2048, 224),
    ("illama-base-in21kin1k-384-85.0.pth", 768, 12, 2048, 384),
    ("illama-large-in21kin1k-224-84.8.pth", 1024, 16, 2816, 224),
    ("illama-large-in21kin1k-384-86.0.pth", 1024, 16, 2816, 384),
]


def released_state(width, hidden, image_size, depth=1, classes=1000):
    """Returns random weights with the names and shapes of the released files, independently of this project's model."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (image_size // 16) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (width,),
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.qkv.bias": (3 * width,),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.attn.proj.bias": (width,),
            f"blocks.{i}.norm2.weight": (width,),
            f"blocks.{i}.mlp.fc1.weight": (hidden, width),
            f"blocks.{i}.mlp.fc2.weight": (width, hidden),
            f"blocks.{i}.mlp.fc3.weight": (hidden, width),
        }
    shapes |= {"norm.weight": (width,), "head.weight": (classes, width), "head.bias": (classes,)}
    torch.manual_seed(0)
    return {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}


def save_released(path, state):
    """Saves what the released code saves: weights, optimizer, epoch, loss scaler and command line."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(lr=4e-3, model="illama_tiny", opt_betas=None, clip_grad=None, eval=False)
    content = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 299, "scaler": {}, "args": arguments}
    torch.save(content, path)
    return path
