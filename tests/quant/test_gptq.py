"""GPTQ, against its definition and against rounding to nearest."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA
from quant.quantizers import gptq as module
from quant.quantizers.calibrate import calibrate
from quant.quantizers.gptq import gptq
from quant.quantizers.layers import QuantizedConv2d, QuantizedLinear, WeightQuantizer, quantizers
from quant.quantizers.observers import weight_amax
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import resolve, shipped_scheme

SPECS = [
    TensorSpec("int4", "group", 16, calibrator="mse"),
    TensorSpec("int4", "channel"),
    TensorSpec("int8", "tensor"),
    TensorSpec("fp8", "channel"),
]


def _quantizer(weight, spec):
    return WeightQuantizer(spec, weight_amax(weight, spec))


def _correlated(count, width, seed):
    """Vectors of a few directions and a little noise, as the inputs of a network's layers are."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(max(width // 4, 1), width, generator=generator, dtype=torch.float64)
    mixed = torch.randn(count, len(directions), generator=generator, dtype=torch.float64) @ directions
    return mixed + 0.1 * torch.randn(count, width, generator=generator, dtype=torch.float64)


def _by_elimination(weight, quantizer, moments):
    """Equations 2 and 3 of arXiv 2210.17323, with the inverse of what is left computed anew for every channel."""
    scales = quantizer.scale.expand(len(weight), *quantizer.scale.shape[1:])
    groups = scales.flatten(1).shape[1]
    scales = scales.flatten(1).repeat_interleave(weight.shape[1] // groups, 1)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    waiting = moments.diagonal().argsort(descending=True, stable=True).tolist()
    values, rounded = weight.double().clone(), torch.empty_like(weight)
    while waiting:
        inverse = torch.linalg.inv(damped[waiting][:, waiting])
        first = waiting[0]
        steps = quantizer.dtype.quantize(values[:, first].float(), scales[:, first]).float()
        rounded[:, first] = steps * scales[:, first]
        error = (values[:, first] - rounded[:, first]) / inverse[0, 0]
        values[:, waiting] -= torch.outer(error, inverse[0])
        waiting = waiting[1:]
    return rounded


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), width=st.sampled_from([16, 48, 160]), spec=st.sampled_from(SPECS))
def test_it_agrees_with_its_definition(seed, width, spec):
    """160 channels are more than the block that is updated at a time."""
    torch.manual_seed(seed)
    weight = torch.randn(5, width)
    quantizer, inputs = _quantizer(weight, spec), _correlated(4 * width, width, seed)
    moments = inputs.T @ inputs / len(inputs)
    found = gptq(weight, quantizer, moments)
    assert torch.equal(quantizer(found), found)  # rounding to nearest does not change it
    # A value halfway between two steps can be rounded either way by an error of 1e-16, and changes all after it.
    same = (found == _by_elimination(weight, quantizer, moments)).all(1)
    assert same.float().mean() >= 0.8


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_error_of_the_output_is_smaller_than_by_rounding_to_nearest(spec):
    torch.manual_seed(0)
    weight = torch.randn(32, 96)
    quantizer, inputs = _quantizer(weight, spec), _correlated(2000, 96, 0)
    used, unused = inputs[:1000], inputs[1000:]

    def error(rounded):
        return (unused @ (rounded - weight).double().T).square().mean()

    assert error(gptq(weight, quantizer, used.T @ used / len(used))) < 0.4 * error(quantizer(weight))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_independent_inputs_are_rounded_to_nearest(spec):
    """There is nothing to cancel: no other channel knows of an error."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    quantizer = _quantizer(weight, spec)
    variances = torch.rand(32, dtype=torch.float64).diag()
    assert torch.equal(gptq(weight, quantizer, variances), quantizer(weight))


def test_constant_and_dead_inputs():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    quantizer = _quantizer(weight, TensorSpec("int4", "channel"))
    assert torch.equal(gptq(weight, quantizer, torch.zeros(32, 32, dtype=torch.float64)), quantizer(weight))
    constant = torch.ones(32, 32, dtype=torch.float64)  # the error of a sum is what counts
    found = gptq(weight, quantizer, constant)
    assert (found - weight).sum(1).abs().max() <= 0.51 * quantizer.scale.max()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = ILLaMA(ModelConfig(28, 7, in_channels=1, width=64, depth=2, heads=2, num_classes=10, mlp="gelu"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.randn(96, 1, 7, 7, generator=generator), size=28, mode="bilinear")
    return list(smooth.split(32))


def _logits(model, images):
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images]).double()


@pytest.mark.parametrize("name", ["fp8", "w4a16", "w4a8"])
def test_a_network_is_closer_to_the_float_network(name, network, images):
    before = copy.deepcopy(network.state_dict())
    scheme = replace(shipped_scheme(name), gptq=True, reconstruction_iterations=0)
    exact = _logits(network, images[2:])
    errors = {}
    for each in (scheme, scheme.rounding_to_nearest()):
        quantized = calibrate(network, resolve(each, network), images[:2])
        errors[each.gptq] = (_logits(quantized, images[2:]) - exact).square().mean()
        for tensor, quantizer in quantizers(quantized):
            if isinstance(quantizer, WeightQuantizer) and each.gptq:
                weight = quantized.get_submodule(tensor.removesuffix(".weight")).weight
                torch.testing.assert_close(quantizer(weight), weight, rtol=1e-6, atol=0)
    assert errors[True] < 0.8 * errors[False]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_bias_makes_up_for_the_mean_error_of_its_layer(network, images):
    """Also of a convolution; a layer without a bias gets none."""
    network = copy.deepcopy(network)
    network.blocks[0].mlp.fc1.bias = None
    scheme = replace(shipped_scheme("fp8"), gptq=True)
    quantized = calibrate(network, resolve(scheme, network), images)
    seen = {}

    def note(name):
        return lambda _, inputs, output: seen.setdefault(name, []).append((inputs[0], output))

    names = [name for name, layer in quantized.named_modules() if isinstance(layer, QuantizedLinear | QuantizedConv2d)]
    for name in names:
        network.get_submodule(name).register_forward_hook(note(name))
    _logits(network, images)
    assert quantized.blocks[0].mlp.fc1.bias is None
    # The last qkv is called for parts of its outputs.
    for name in set(names) - {"blocks.0.mlp.fc1", "blocks.1.attn.qkv"}:
        layer = quantized.get_submodule(name)
        with torch.no_grad():
            errors = torch.cat([(layer(x) - y).flatten(2).mT if y.ndim == 4 else layer(x) - y for x, y in seen[name]])
        errors = errors.reshape(-1, errors.shape[-1])
        assert errors.mean(0).abs().max() < 1e-5 + 1e-3 * errors.abs().max(), name


@pytest.mark.parametrize("iterations", [0, 2])
def test_a_network_rounded_block_by_block_has_the_same_weights(iterations, network, images, monkeypatch):
    """Without reconstruction, in place: the images must not pass through rounded layers, and the network is kept."""
    before = copy.deepcopy(network.state_dict())
    plan = resolve(replace(shipped_scheme("w4a16"), gptq=True, reconstruction_iterations=iterations), network)
    whole = calibrate(network, plan, images)
    monkeypatch.setattr(module, "_ENTRIES", 256 * 256)  # of the widest layer
    parts = calibrate(network, plan, images)
    for (name, value), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
        assert value.is_contiguous() and other.is_contiguous()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_part_of_the_images_is_used_if_they_have_many_tokens(network, images, monkeypatch):
    plan = resolve(replace(shipped_scheme("w4a16"), gptq=True, reconstruction_iterations=0), network)
    monkeypatch.setattr(module, "_ENTRIES", 256 * 256)
    monkeypatch.setattr(module, "_VECTORS", 48 * 17)  # 16 patches and the class token: every second image
    half = calibrate(network, plan, images)
    seen, reached = [], module.block_inputs

    def note(model, batches):
        seen.append(sum(map(len, batches)))
        return reached(model, batches)

    monkeypatch.setattr(module, "block_inputs", note)
    for size in (1, 7, 32):
        seen.clear()
        calibrate(network, plan, torch.cat(images).split(size))
        assert seen == [1, 48]
    exact = _logits(network, images)
    nearest = calibrate(network, resolve(plan.scheme.rounding_to_nearest(), network), images)
    errors = [(_logits(each, images) - exact).square().mean() for each in (half, nearest)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("widest", [10, 1000])
def test_convolutions_with_borders_strides_and_groups(groups, widest, monkeypatch):
    """A grouped convolution, and one with more inputs than covariances are computed for, are rounded to nearest."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=2, groups=groups)
    spec = TensorSpec("int4", "channel", calibrator="mse")
    layer = QuantizedConv2d(convolution, _quantizer(convolution.weight.detach(), spec), None)
    small = torch.randn(40, 8, 4, 4)
    images = torch.nn.functional.interpolate(small, size=16, mode="bilinear")
    used, unused = list(images[:32].split(8)), images[32:]
    with torch.no_grad():
        exact, nearest = convolution(unused), layer(unused)
        monkeypatch.setattr(module, "_ENTRIES", widest**2)
        module.round_weights(nn.Sequential(convolution), nn.Sequential(layer), used)
        found = layer(unused)
    if groups == 2 or widest == 10:
        assert torch.equal(found, nearest)
    else:
        assert (found - exact).square().mean() < 0.5 * (nearest - exact).square().mean()


def test_a_fraction_of_many_inputs_is_as_good(network, images, monkeypatch):
    """Fewer images, and of a convolution's inputs also fewer positions, are enough for a covariance."""
    plan = resolve(replace(shipped_scheme("w4a16"), reconstruction_iterations=0), network)
    exact, errors = _logits(network, images[2:]), []
    for limit in (1 << 15, 400):
        monkeypatch.setattr(module, "_VECTORS", limit)
        errors.append((_logits(calibrate(network, plan, images[:2]), images[2:]) - exact).square().mean())
    nearest = calibrate(network, resolve(plan.scheme.rounding_to_nearest(), network), images[:2])
    assert errors[0] != errors[1] and errors[1] < 0.8 * (_logits(nearest, images[2:]) - exact).square().mean()
