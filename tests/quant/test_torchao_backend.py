"""Deployment with torchao: quantized layers, accuracy, files, training and compilation."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from support import SMALL
from torch import nn
from torchao.utils import TorchAOBaseTensor

from illama import ILLaMA
from illama.bundle import SHIPPED, TORCHAO
from illama.checkpoints.load import load_checkpoint
from illama.errors import UserError
from illama.inference import torch_infer
from illama.models.illama import Linear
from illama.models.timm_vit import to_quantizable
from quant.quantizers.torchao_backend import (
    SplitLinear,
    convert_qat,
    load_torchao,
    prepare_qat,
    quantize_with_torchao,
    write_torchao,
)
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import Scheme, resolve, shipped_scheme
from quant.schemes.shipped import SHIPPED_SCHEMES

NAMES = sorted(name for name in SHIPPED_SCHEMES if shipped_scheme(name).backend == "torchao")


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint(SHIPPED).model


@pytest.fixture
def small():
    torch.manual_seed(0)
    return ILLaMA(SMALL).eval()


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_on_real_images(shipped, name, real_images):
    images = real_images[0][:100]
    before = copy.deepcopy(shipped.state_dict())
    quantized = quantize_with_torchao(shipped, resolve(shipped_scheme(name), shipped))
    weights = [module.weight for module in quantized.modules() if isinstance(module, nn.Linear)]
    assert len(weights) == 5 * shipped.config.depth + 1 + 1  # the last block's qkv is two
    assert all(isinstance(weight, TorchAOBaseTensor) for weight in weights)
    expected, logits = torch_infer(shipped)(images), torch_infer(quantized)(images)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < (0.2 if name.startswith("w4") else 0.05)
    assert (logits.argmax(1) == expected.argmax(1)).mean() > (0.95 if name.startswith("w4") else 0.99)
    assert all(torch.equal(value, before[key]) for key, value in shipped.state_dict().items())


def test_8_bit_weights_are_off_by_half_a_step_at_most(small):
    quantized = quantize_with_torchao(small, resolve(shipped_scheme("int8-weight-only-torchao"), small))
    weight, rounded = small.blocks[0].mlp.fc1.weight, quantized.blocks[0].mlp.fc1.weight.dequantize()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= 0.501 * step).all() and not torch.equal(rounded, weight)


@pytest.mark.parametrize("bias", [True, False])
def test_a_split_linear_is_the_linear(bias):
    linear, x = Linear(8, 12, bias=bias), torch.randn(2, 3, 8)
    split = SplitLinear(linear, [4, 8])
    if bias:
        for outputs in (None, slice(0, 4), slice(4, None), slice(0, 12)):
            torch.testing.assert_close(split(x, outputs), linear(x, outputs))
    torch.testing.assert_close(split(x), linear(x))
    with pytest.raises(ValueError, match="0 to 5"):
        split(x, slice(0, 5))


@pytest.mark.parametrize("name", NAMES)
def test_computing_only_the_read_out_gives_the_same(small, images, name):
    quantized = quantize_with_torchao(small, resolve(shipped_scheme(name), small))
    with torch.inference_mode():
        alone = quantized(images)
        quantized.readout_only = False
        torch.testing.assert_close(quantized(images), alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_the_same_outputs(small, images, name, tmp_path):
    quantized = quantize_with_torchao(small, resolve(shipped_scheme(name), small))
    path = write_torchao(quantized, tmp_path)
    first = path.read_bytes()
    opened = load_torchao(tmp_path)
    assert torch.equal(opened(images), quantized(images))
    assert write_torchao(opened, tmp_path).read_bytes() == first
    with safe_open(path, "pt") as file:
        kinds = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    wide = [key for key, kind in kinds.items() if kind == torch.float32 and key.endswith(("qkv.weight", "fc1.weight"))]
    assert not wide and {torch.int8, torch.float8_e4m3fn} & set(kinds.values())


def test_networks_of_timm(tmp_path):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 5}
    vits = [to_quantizable(timm.create_model("vit_tiny_patch16_224", **options).eval()) for _ in range(2)]
    images = torch.randn(4, 3, 32, 32)
    quantized = quantize_with_torchao(vits[0], resolve(shipped_scheme("int8-dynamic"), vits[0]))
    torch.testing.assert_close(quantized(images), vits[0](images), atol=0.02, rtol=0.05)
    write_torchao(quantized, tmp_path)
    assert torch.equal(load_torchao(tmp_path, vits[1])(images), quantized(images))
    with pytest.raises(UserError, match=TORCHAO):
        load_torchao(tmp_path)


def test_a_file_is_a_quarter_of_the_float_one(shipped, tmp_path):
    path = write_torchao(quantize_with_torchao(shipped, resolve(shipped_scheme("int8-dynamic"), shipped)), tmp_path)
    assert path.stat().st_size < 0.3 * (SHIPPED / "model.safetensors").stat().st_size


def test_files_that_cannot_be_used_are_refused(small, tmp_path):
    with pytest.raises(UserError, match=TORCHAO):
        load_torchao(tmp_path)
    path = write_torchao(quantize_with_torchao(small, resolve(shipped_scheme("int8-dynamic"), small)), tmp_path)
    with pytest.raises(UserError, match=TORCHAO):
        load_torchao(tmp_path, ILLaMA(replace(SMALL, depth=3)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=TORCHAO):
        load_torchao(tmp_path)
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match=TORCHAO):
        load_torchao(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_quantization_aware_training(small, images, name):
    """A few steps lower the loss, and the converted network computes what the trained one does."""
    scheme, labels = shipped_scheme(name), torch.tensor([0, 1, 2, 0, 1, 2])
    plan = resolve(scheme, small)
    prepared = prepare_qat(small, plan).train()
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(prepared(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in prepared.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    converted = convert_qat(prepared, plan)
    torch.testing.assert_close(converted(images), prepared.eval()(images), atol=2e-3, rtol=2e-2)
    assert isinstance(converted.blocks[0].mlp.fc1.weight, TorchAOBaseTensor)


def test_training_ends_in_the_same_file_format(small, images, tmp_path):
    plan = resolve(shipped_scheme("int8-dynamic"), small)
    converted = convert_qat(prepare_qat(small, plan), plan)
    write_torchao(converted, tmp_path)
    assert (tmp_path / TORCHAO).exists()
    torch.testing.assert_close(load_torchao(tmp_path)(images), converted(images))
    torch.testing.assert_close(converted(images), quantize_with_torchao(small, plan)(images))


W8, TOKEN = TensorSpec("int8", "channel"), TensorSpec("uint8", "token", symmetric=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backend": "onnx"}, "backend: torchao"),
        ({"reconstruction_iterations": 5}, "reconstruction_iterations"),
        ({"tensors": {"*.weight": W8}}, "patch_embed.proj.weight"),
        ({"tensors": {"head.weight": TensorSpec("int8")}}, "head: .*int8"),
        ({"tensors": {"head.weight": TensorSpec("int8", "channel", calibrator="mse")}}, "calibrator max"),
        ({"tensors": {"head.weight": W8, "head.input": TensorSpec("int8")}}, "head.input"),
        ({"tensors": {"head.input": TOKEN}}, "calibrator max"),
        ({"tensors": {"head.weight": TensorSpec("fp8", "channel"), "head.input": TOKEN}}, "head: .*fp8"),
        ({"tensors": {"*.core.q": TOKEN}}, "core.q"),
    ],
)
def test_schemes_that_torchao_does_not_support_are_refused(small, changes, words):
    scheme = replace(Scheme("mine", {"head.weight": W8}, backend="torchao"), **changes)
    for use in (quantize_with_torchao, prepare_qat):
        with pytest.raises(UserError, match=words):
            use(small, resolve(scheme, small))


def test_part_of_a_network_can_stay_in_floating_point(small):
    scheme = Scheme("mine", {"blocks.0.mlp.*.weight": W8}, backend="torchao")
    quantized = quantize_with_torchao(small, resolve(scheme, small))
    kinds = {
        name: isinstance(m.weight, TorchAOBaseTensor) for name, m in quantized.named_modules() if hasattr(m, "weight")
    }
    assert {name for name, chosen in kinds.items() if chosen} == {f"blocks.0.mlp.fc{index}" for index in (1, 2, 3)}


def test_compiled_it_gives_the_same(small, images):
    quantized = quantize_with_torchao(small, resolve(shipped_scheme("int8-dynamic"), small))
    with torch.inference_mode():
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")  # inductor takes a minute
        torch.testing.assert_close(compiled(images), quantized(images), atol=5e-3, rtol=2e-2)
