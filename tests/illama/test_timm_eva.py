"""timm's Evas, compared with timm's network: converted, causal, rotated, smoothed, quantized and exported."""

import copy
import math

import pytest
import torch
from timm.models.eva import Eva
from timm_networks import EVAS, REGISTERED_EVAS, SMALL, build, images_for, saved

from illama.checkpoints.timm_checkpoint import load_timm
from illama.errors import UserError
from illama.graph.session import cpu_session
from illama.models.attention import MaskedAttention
from illama.models.timm_vit import to_causal, to_quantizable
from quant.export.onnx_export import export_onnx
from quant.quantizers.calibrate import calibrate
from quant.quantizers.rotation import prepare
from quant.quantizers.smoothquant import smooth
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import Rotations, Scheme, resolve, shipped_scheme

VARIANTS = pytest.mark.parametrize("name", EVAS)


def run(path, images):
    return torch.from_numpy(cpu_session(path, threads=1).run(None, {"images": images.numpy()})[0])


def close(found, expected, tolerance=1e-5):
    return bool((found - expected).abs().max() < tolerance * max(1, expected.detach().abs().max()))


@VARIANTS
def test_a_quantizable_network_equals_timm_s(name):
    eva, images = build(name), images_for(name).requires_grad_()
    model = to_quantizable(eva)
    expected, features = eva(images), eva.forward_features(images)
    (gradient,) = torch.autograd.grad(expected.square().mean(), images)
    for form in ("plain", "fused", None):
        model.set_attention_form(form)
        logits = model(images)
        assert close(logits, expected) and close(model.forward_features(images), features)
        (found,) = torch.autograd.grad(logits.square().mean(), images)
        assert close(found / gradient.abs().max(), gradient / gradient.abs().max(), 1e-4)


@VARIANTS
@torch.no_grad()
def test_a_causal_network_equals_timm_s_with_the_same_mask(name):
    """timm's Eva takes a mask, which is added before the softmax."""
    eva, images = build(name), images_for(name)
    model, prefix = to_causal(eva, "pre_softmax"), eva.num_prefix_tokens
    tokens = prefix + eva.patch_embed.num_patches
    classes = int(eva.cls_token is not None)
    rank = torch.tensor([tokens - 1] * classes + list(range(tokens - prefix, tokens - classes)) + [*range(16)])
    assert close(model(images), eva(images, attn_mask=rank[None, :] <= rank[:, None]))
    model.soft_mask = 1.0
    assert close(model(images), eva(images))


@VARIANTS
@torch.no_grad()
def test_rotations_and_smoothing_do_not_change_the_output(name):
    eva, images = build(name).double(), images_for(name).double()
    scheme = Scheme("all", {"*.input": TensorSpec("int8"), "*.core.[kv]": TensorSpec("int8")}, {"*": 0.5})
    smoothed = to_quantizable(eva)
    smooth(smoothed, scheme, [images])
    rotated, changed = to_quantizable(eva), Scheme("r", scheme.tensors, {}, Rotations("auto", "auto", 16))
    prepare(rotated, changed, [images])
    expected = to_quantizable(eva)(images)
    assert close(smoothed(images), expected, 1e-10) and close(rotated(images), expected, 1e-10)
    weights = [module.qkv.weight for module in rotated.modules() if hasattr(module, "qkv")]
    assert not torch.equal(weights[0], to_quantizable(eva).vit.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("scheme", ["int8", "fp8-attention"])
@torch.no_grad()
def test_the_file_of_a_quantized_network_rounds_as_pytorch_does(scheme, tmp_path):
    model, images = to_quantizable(build("vit_small_patch16_dinov3")), torch.randn(16, 3, 32, 32)
    quantized = calibrate(model, resolve(shipped_scheme(scheme), model), [images])
    export_onnx(quantized, tmp_path / "model.onnx", "plain")
    expected, found = quantized(images), run(tmp_path / "model.onnx", images)
    rounding, ties = ((a - b).square().mean() for a, b in ((expected, model(images)), (found, expected)))
    assert rounding > 0 and ties < 0.1 * rounding < 0.01 * expected.square().mean()


@pytest.mark.parametrize("name", REGISTERED_EVAS)
@pytest.mark.parametrize("size", [None, 64])
def test_a_loaded_file_equals_timm_s_network(name, size, tmp_path):
    eva, path = saved(tmp_path, name)
    model = load_timm(name, path, size).model
    trained = 32 if eva.pos_embed is not None else 64  # the table says it; without one, timm's default for the name
    assert model.config.image_size == (size or trained)
    eva.set_input_size(img_size=(size or trained,) * 2)
    images = torch.randn(2, 3, size or trained, size or trained)
    with torch.no_grad():
        assert close(model(images), eva(images))


def test_what_a_conversion_would_get_wrong_is_refused():
    class Own(Eva):
        def forward_features(self, x, **_):
            return 2 * super().forward_features(x)

    strange = build("vit_small_patch16_dinov3")
    strange.blocks[1].attn = MaskedAttention()
    for eva, word in (
        (Own(**SMALL), "forward_features"),
        (Eva(**SMALL, patch_drop_rate=0.5), "patch_drop_rate"),
        (strange, "MaskedAttention"),
    ):
        for take in (to_causal, to_quantizable):
            with pytest.raises(UserError, match=word):
                take(eva)


def test_the_original_is_not_changed():
    eva = build("vit_small_patch16_dinov3")
    before = copy.deepcopy(eva.state_dict())
    model = to_quantizable(eva)
    for parameter in model.parameters():
        parameter.data.fill_(math.pi)
    assert all(torch.equal(value, before[key]) for key, value in eva.state_dict().items())


def test_a_conversion_draws_no_random_numbers():
    eva = build("vit_small_patch16_dinov3")
    before = torch.get_rng_state()
    to_quantizable(eva)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_inside_a_gated_mlp_is_kept():
    eva = build("vit_huge_plus_patch16_dinov3").train()
    for block in eva.blocks:
        block.mlp.drop1.p = block.mlp.drop2.p = 0.5
    images, found = images_for(""), []
    for network in (eva, to_quantizable(eva)):
        torch.manual_seed(1)
        found.append(network(images))
    assert close(found[1], found[0]) and not close(eva.eval()(images), found[0], 1e-2)
