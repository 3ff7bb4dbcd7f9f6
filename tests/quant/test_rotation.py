"""Rotations: the float network stays the same in float64, and quantized networks are closer to it."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from deploy.runtimes.open_engine import load_engine
from illama.errors import UserError
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA
from illama.models.timm_vit import CausalVisionTransformer, to_causal, to_quantizable
from illama.models.upernet import SegmentationConfig, TimmSegmentationConfig, TimmUperNet, UperNet
from illama.options import SourceOptions
from quant.export.onnx_export import export_onnx
from quant.export.weights import read_quantized_weights, write_quantized_weights
from quant.export.write_bundle import plan_quantization
from quant.inputs import open_inputs
from quant.mixed_precision.search_space import format_schemes
from quant.quantizers.calibrate import calibrate
from quant.quantizers.rotation import (
    choose_mlps,
    prepare,
    random_rotation,
    rotatable_mlps,
    rotate,
    rotate_hidden,
    rotated_mlps,
)
from quant.quantizers.torchao_backend import check
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import Rotations, Scheme, resolve, shipped_scheme

ALL = Rotations(residual=True, values=True, hidden=64)
SHAPE = {"image_size": 16, "patch_size": 4, "width": 48, "depth": 4, "heads": 3, "num_classes": 5}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def randomized(model):
    """The network in float64, with random norms, biases and scales, which a new network has at 1 and 0."""
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def difference(model, spec=ALL):
    channels, size = model.config.in_channels, model.config.image_size
    images = torch.randn(3, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = copy.deepcopy(model)
    rotate(rotated, spec)
    rotate_hidden(rotated, spec, rotatable_mlps(rotated, replace(shipped_scheme("int8"), rotate=spec)))
    weights = zip(model.parameters(), rotated.parameters(), strict=False)
    assert any(not torch.equal(a, b) for a, b in weights if a.shape == b.shape)
    with torch.no_grad():
        exact, found = model(images), rotated(images)
    return float((found - exact).abs().max() / exact.abs().max())


@given(st.sampled_from([1, 2, 3, 12, 16, 24, 40, 64, 88]), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_random_rotation_is_orthogonal_and_keeps_the_vector_of_ones_if_asked(size, keeps_ones, seed):
    matrix = random_rotation(size, torch.Generator().manual_seed(seed), keeps_ones)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    if keeps_ones:
        torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", ["post_softmax", "pre_softmax", "bidirectional"])
@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"norm": "layer"},
        {"mlp": "gelu"},
        {"position": "learnable"},
        {"global_pool": "avg"},
        {"global_pool": "", "num_classes": 0},
    ],
)
def test_an_illama_computes_the_same(mask, form, changed):
    model = randomized(ILLaMA(ModelConfig(**{**SHAPE, "mask": mask, **changed})))
    model.set_attention_form(form)
    assert difference(model) < 1e-12


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"init_values": 0.1},  # LayerScale
        {"reg_tokens": 2},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "max"},
        {"global_pool": "map"},
        {"num_classes": 0},
        {"class_token": False, "global_pool": "avg"},
        {"qkv_bias": False, "qk_norm": True},
        {"pos_embed": "none"},
        {"block_fn": timm.models.vision_transformer.ParallelThingsBlock},
        {"mlp_layer": timm.layers.SwiGLUPacked, "mlp_ratio": 4},
        {"mlp_layer": timm.layers.SwiGLU},
        {"norm_layer": timm.layers.RmsNorm},
    ],
    ids=str,
)
@pytest.mark.parametrize("convert", [to_quantizable, to_causal])
def test_a_timm_vit_computes_the_same(changed, convert):
    assert difference(randomized(convert(VisionTransformer(**{**VIT, **changed})))) < 1e-12


def test_a_distilled_deit_computes_the_same():
    vit = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=5)
    assert difference(randomized(to_quantizable(vit))) < 1e-12


def test_a_segmentation_network_computes_the_same():
    pytest.importorskip("segmentation_models_pytorch")
    config = SegmentationConfig(**{**SHAPE, "image_size": 32}, decoder_channels=16)
    assert difference(randomized(UperNet(config))) < 1e-12
    options = {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
    for name in ("vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_gap_224", "vit_small_patch16_dinov3"):
        theirs = TimmSegmentationConfig(name, 32, 3, 5, options=options, decoder_channels=16)
        assert difference(randomized(TimmUperNet(theirs))) < 1e-12


@pytest.mark.parametrize(
    ("changed", "spec", "named"),
    [
        ({"pre_norm": True}, Rotations(residual=True), "norm_pre"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, Rotations(residual=True), "blocks.0"),
        ({"scale_attn_norm": True}, Rotations(values=True), "blocks.0.attn.norm"),
    ],
    ids=["norm_pre", "post-norm", "attention norm"],
)
def test_a_network_that_does_not_commute_is_refused_by_name_or_left_as_it_is(changed, spec, named, capsys):
    model = to_quantizable(VisionTransformer(**{**VIT, **changed})).double().eval()
    with pytest.raises(UserError, match=named):
        rotate(model, spec)
    before = copy.deepcopy(model.state_dict())
    rotate(model, Rotations(*("auto" if asked else False for asked in (spec.residual, spec.values))))
    assert named in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changed", [{"scale_mlp_norm": True}, {"mlp_ratio": 0.5}], ids=["norm", "24 channels"])
def test_inputs_of_fc2_that_cannot_be_rotated_are_named_and_left_as_they_are(changed, capsys):
    model = to_quantizable(VisionTransformer(**{**VIT, **changed})).double().eval()
    before = copy.deepcopy(model.state_dict())
    prepare(model, replace(shipped_scheme("fp8"), rotate=Rotations(hidden=64)), [])
    assert "blocks.0.mlp.fc2" in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_required_rotation_is_refused_before_any_work():
    model = to_quantizable(VisionTransformer(**VIT, pre_norm=True))
    with pytest.raises(UserError, match="norm_pre"):
        plan_quantization(model, replace(shipped_scheme("int8"), rotate=Rotations(residual=True)))


def small_network(**changed):
    torch.manual_seed(0)
    model = ILLaMA(ModelConfig(**{**SHAPE, "width": 64, "heads": 2}, **changed)).eval()
    return model, torch.randn(16, 3, 16, 16)


def test_the_exported_file_computes_what_pytorch_does(tmp_path):
    model, images = small_network()
    scheme = replace(shipped_scheme("int8-accurate"), reconstruction_iterations=2)
    quantized = calibrate(model, resolve(scheme, model), [images])
    export_onnx(quantized, tmp_path / "model.onnx", "plain")
    found = torch.from_numpy(load_engine(tmp_path / "model.onnx", "onnxruntime").infer(images.numpy()))
    with torch.no_grad():
        expected = quantized(images)
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.03


def test_the_block_whose_rounding_changes_the_output_most_is_rotated_which_helps():
    inputs = open_inputs(SourceOptions(calibration_images=64))
    model, images, int8 = inputs.model, inputs.calibration[0], shipped_scheme("int8")

    def error(scheme):
        with torch.no_grad():
            return float((calibrate(model, resolve(scheme, model), [images])(images) - model(images)).square().mean())

    def only(name):
        return Scheme("only", {f"{name}.fc2.input": TensorSpec("uint8", symmetric=False)})

    blocks = [name.removesuffix(".fc2") for name, _ in model.named_modules() if name.endswith("mlp.fc2")]
    errors = {name: error(only(name)) for name in blocks}
    order = sorted(blocks, key=errors.__getitem__, reverse=True)
    rotations = [Rotations(hidden=32, hidden_blocks=count) for count in (1, 2, 0)]
    one, two, every = (choose_mlps(model, replace(int8, rotate=each), [images]) for each in rotations)
    assert (one, two[:1], every) == (order[:1], order[:1], blocks)
    assert errors[two[1]] > 0.7 * errors[order[1]]  # several blocks have nearly the second largest error
    assert rotated_mlps(calibrate(model, resolve(int8, model), [images])) == order[:1]
    assert error(int8) < 0.5 * error(replace(int8, rotate=Rotations()))  # 3 dB
    without = replace(int8, tensors={**int8.tensors, f"{order[0]}.fc2.input": None})
    (another,) = rotated_mlps(calibrate(model, resolve(without, model), [images]))
    assert another in order[1:]


# A LayerNorm's bias gives a SwiGLU's Linears one; int8 rotates the inputs of one fc2 only.
@pytest.mark.parametrize(
    ("name", "changed"), [("int8-accurate", {}), ("int8", {}), ("int8-accurate", {"norm": "layer"})]
)
def test_a_stored_network_is_read_back(name, changed, tmp_path):
    model, images = small_network(**changed)
    scheme = replace(shipped_scheme(name), reconstruction_iterations=0)
    quantized = calibrate(model, resolve(scheme, model), [images])
    write_quantized_weights(quantized, scheme, tmp_path / "model.safetensors")
    stored, found = read_quantized_weights(tmp_path / "model.safetensors", model)
    assert found == scheme
    with torch.no_grad():
        assert torch.equal(stored(images), quantized(images))


def test_a_search_rotates_as_its_first_format_does_and_torchao_does_not_rotate():
    assert {scheme.rotate for scheme in format_schemes(["int8-accurate", "int8", "w4a16"])} == {
        shipped_scheme("int8-accurate").rotate
    }
    model, _ = small_network()
    scheme = replace(shipped_scheme("int8-weight-only-torchao"), rotate=ALL)
    with pytest.raises(UserError, match="rotate"):
        check(model, resolve(scheme, model))


def _biased(model, part):
    """A network whose keys or values are far from 0, as in pretrained networks."""
    generator = torch.Generator().manual_seed(2)
    for name, bias in model.named_parameters():
        if name.endswith("qkv.bias"):
            width = len(bias) // 3
            start = "qkv".index(part) * width
            bias.data[start : start + width] += 20 * torch.randn(width, generator=generator)
    return model


@pytest.mark.parametrize(
    ("network", "centered"),
    [
        (lambda: ILLaMA(ModelConfig(**SHAPE, position="learnable")), "k"),  # the mask is multiplied after the softmax
        (lambda: ILLaMA(ModelConfig(**SHAPE)), ""),  # RoPE turns the mean of the keys
        (lambda: ILLaMA(ModelConfig(**SHAPE, mask="pre_softmax")), "v"),
        (lambda: to_quantizable(VisionTransformer(**VIT)), "kv"),
        (lambda: to_causal(VisionTransformer(**VIT), mask="post_softmax"), "k"),
        (lambda: to_quantizable(VisionTransformer(**VIT, init_values=0.5, proj_bias=False)), "kv"),
        (lambda: to_quantizable(VisionTransformer(**VIT, qk_norm=True)), "v"),
        (lambda: to_quantizable(VisionTransformer(**VIT, scale_attn_norm=True)), "k"),
        (lambda: to_quantizable(VisionTransformer(**VIT, qkv_bias=False)), ""),
    ],
    ids=["learnable", "rope", "pre-softmax", "timm", "causal", "LayerScale", "k_norm", "norm of values", "no bias"],
)
@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("rotations", [Rotations(), Rotations(residual="auto", values="auto")], ids=["", "rotated"])
def test_keys_and_values_are_centered_where_it_costs_nothing(network, centered, form, rotations):
    if centered == "" and rotations.residual and isinstance(network(), CausalVisionTransformer):
        centered = "kv"  # the bias of the norm before qkv has become its bias
    model = _biased(_biased(randomized(network()), "k"), "v")
    model.set_attention_form(form)
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = copy.deepcopy(model)
    prepare(changed, Scheme("centered", {"*.core.[kv]": TensorSpec("int8")}, rotate=rotations), [images])
    means = {"k": [], "v": []}

    def note(_, inputs):
        for part, tensor in zip("kv", inputs[1:3], strict=True):
            means[part].append(tensor.mean((0, 2)).abs().max())

    for attention in [module for module in changed.modules() if hasattr(module, "core")]:
        attention.core.register_forward_pre_hook(note)
    with torch.no_grad():
        torch.testing.assert_close(changed(images), model(images), rtol=1e-10, atol=1e-10)
    assert {part for part, found in means.items() if max(found) < 1e-9} == set(centered)


@pytest.mark.parametrize("part", ["k", "v"])
def test_a_bias_of_keys_or_values_does_not_change_the_quantized_network(part):
    plain = randomized(to_quantizable(VisionTransformer(**VIT)))
    biased = _biased(copy.deepcopy(plain), part)
    if part == "v":  # the same network again: attention adds the bias to all of its outputs
        for first, second in zip(plain.vit.blocks, biased.vit.blocks, strict=True):
            change = (second.attn.qkv.bias - first.attn.qkv.bias)[-VIT["embed_dim"] :]
            second.attn.proj.bias.data -= second.attn.proj.weight @ change
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scheme = Scheme("centered", {"*.core.k": TensorSpec("int4"), "*.core.[pv]": TensorSpec("int8")})
    with torch.no_grad():
        first, second = (calibrate(m.float(), resolve(scheme, m), [images])(images) for m in (plain, biased))
    assert (first - second).norm() < 0.02 * first.norm()
