"""Rank of attention maps, against numpy and on cases with a known answer."""

import json
import math

import numpy as np
import pytest
import torch
from support import assert_one_line_error

from eval.metrics.rank import attention_rank, map_rank
from illama import ILLaMA, ModelConfig
from illama.checkpoints.load import load_checkpoint
from illama.data.datasets import evenly_spaced, open_data
from illama.inference import load_images

CONFIG = ModelConfig(image_size=32, patch_size=8, width=32, depth=3, heads=2, num_classes=5)


def random_model(**changes):
    """Weights wide enough that the attention maps are far from uniform."""
    torch.manual_seed(0)
    model = ILLaMA(ModelConfig(**{**CONFIG.to_dict(), **changes}))
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.6)
    return model


@pytest.mark.parametrize("tokens", [5, 10, 17, 35, 197])
def test_identity_has_full_rank_and_uniform_attention_rank_one(tokens):
    assert map_rank(torch.eye(tokens)) == math.ceil(0.8 * tokens)
    assert map_rank(torch.full((tokens, tokens), 1 / tokens)) == 1


def _rank(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    return np.argmax(np.cumsum(values / values.sum()) >= 0.8) + 1


@pytest.mark.parametrize("kind", ["post_softmax", "pre_softmax", "bidirectional"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_attention_rank_is_numpy_s(kind, alpha):
    """q and k of each block from hooks; softmax, mask and singular values in numpy."""
    model = random_model(mask=kind, position="learnable").eval()
    model.soft_mask = alpha
    images = torch.randn(11, 3, 32, 32)
    normed = []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda _, __, x: normed.append(x.detach().double().numpy()))
    ranks, maps = attention_rank(model, images), np.zeros((3, 2, 17, 17))
    seen = alpha + (1 - alpha) * np.tril(np.ones((17, 17)))
    for call, x in enumerate(normed):
        layer = call % 3  # the model may take the images in batches
        qkv = model.blocks[layer].attn.qkv
        flat = x @ qkv.weight.detach().double().numpy().T + qkv.bias.detach().double().numpy()
        parts = flat.reshape(len(x), 17, 3, 2, 16)
        q, k = parts[:, :, 0].swapaxes(1, 2), parts[:, :, 1].swapaxes(1, 2)
        weights = np.exp(q @ k.swapaxes(-1, -2) / 4)
        if kind == "pre_softmax":
            weights = weights * seen
        weights /= weights.sum(-1, keepdims=True)
        if kind == "post_softmax":
            weights = weights * seen
        maps[layer] += weights.sum(0) / len(images)
    assert ranks.shape == (3, 2)
    np.testing.assert_array_equal(ranks, [[_rank(one) for one in layer] for layer in maps])
    assert 1 < ranks.min() < ranks.max() <= 17


def test_attention_rank_leaves_the_model_as_it_was():
    model = random_model().train()
    model.set_attention_form("fused")
    model.blocks[1].attn.core.form = None
    attention_rank(model, torch.randn(1, 3, 32, 32))
    assert model.training and model.readout_only
    assert [block.attn.core.form for block in model.blocks] == ["fused", None, "fused"]
    assert not any(block.attn.core.p._forward_hooks for block in model.blocks)
    with pytest.raises(ValueError, match="threshold"):
        attention_rank(model, torch.randn(1, 3, 32, 32), threshold=1.5)
    assert model.training and not any(block.attn.core.p._forward_hooks for block in model.blocks)
    with pytest.raises(ValueError, match="image"):
        attention_rank(model, torch.randn(0, 3, 32, 32))


def test_the_rank_of_a_checkpoint_by_its_command(run_here, small_bundle, image_folder, tmp_path):
    command = (
        "eval/attention_rank.py",
        "--checkpoint",
        small_bundle,
        "--data",
        image_folder,
        "--out",
        tmp_path / "out",
    )
    result = run_here(*command, "--images", 4)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "attention-rank.json").read_text())
    loaded, data = load_checkpoint(small_bundle), open_data(str(image_folder))
    images, _ = load_images(evenly_spaced(data.test(), 4), loaded.preprocessing.transform())
    expected = attention_rank(loaded.model, torch.from_numpy(images))
    np.testing.assert_array_equal(found["ranks"], expected)
    assert found["tokens"] == 17 and f"| all | {expected.mean():.1f} |" in result.stdout
    assert_one_line_error(run_here(*command, "--threshold", "0"), "--threshold")
    assert_one_line_error(run_here(*command, "--images", "0"), "--images")
