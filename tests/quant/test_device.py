"""Where calibration and block reconstruction run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import SMALL

from illama import ILLaMA
from illama.errors import UserError
from illama.hardware import torch_device
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.quantizers.layers import quantizers
from quant.schemes.scheme import resolve, shipped_scheme


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ILLaMA(SMALL).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int8", "int8-accurate", "fp8-attention", "w4a8"])
def test_a_gpu_calibrates_as_the_cpu_does(name, model):
    scheme = shipped_scheme(name)
    plan = resolve(replace(scheme, reconstruction_iterations=min(scheme.reconstruction_iterations, 20)), model)
    images = torch.randn(16, 3, 32, 32)
    on_cpu, on_gpu = (calibrate(model, plan, images.split(8), device) for device in ("cpu", "cuda"))
    assert {each.device.type for each in (*on_gpu.parameters(), *on_gpu.buffers())} == {"cpu"}
    for (tensor, ours), (_, theirs) in zip(quantizers(on_cpu), quantizers(on_gpu), strict=True):
        torch.testing.assert_close(ours.scale, theirs.scale, rtol=0.02, atol=0, msg=tensor)
    with torch.no_grad():
        exact, *found = (network(images) for network in (model, on_cpu, on_gpu))
    errors = [float((logits - exact).square().mean()) for logits in found]
    assert errors[1] == pytest.approx(errors[0], rel=0.25)


def test_the_device_of_an_option(monkeypatch):
    for there, name, expected in [(None, "auto", "cpu"), (torch.cuda, "auto", "cuda"), (torch.cuda, "cpu", "cpu")]:
        monkeypatch.setattr("illama.hardware.cuda_gpu", lambda there=there: there)
        assert torch_device(name) == expected
    monkeypatch.setattr("illama.hardware.cuda_gpu", lambda: None)
    with pytest.raises(UserError, match="--device cuda"):
        torch_device("cuda")


def test_quantization_and_export_leave_the_network_as_it_was(model, tmp_path):
    """They share its weights instead of copying them; rotations, smoothing and reconstruction change them."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = resolve(replace(shipped_scheme("int8-accurate"), reconstruction_iterations=2), model)
    images = torch.randn(4, 3, 32, 32)
    quantized = calibrate(model, plan, [images])
    quantized_before = {key: value.clone() for key, value in quantized.state_dict().items()}
    with torch.no_grad():
        logits = quantized(images).numpy()
    for network in (model, quantized):
        export_onnx(network, tmp_path / "model.onnx", "plain")
        export_onnx(network, tmp_path / "fused.onnx", "fused", torch.float16)
    for network, state in ((model, before), (quantized, quantized_before)):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    with torch.no_grad():
        np.testing.assert_array_equal(quantized(images).numpy(), logits)
