"""timm's ViTs made causal, compared with the originals at alpha 1 and with the paper's equations in float64."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Attention, AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from timm_networks import NAMED, OPTIONS, SMALL, build, images_for, randomise

from illama.errors import UserError
from illama.models.attention import AttentionMask, MaskedAttention
from illama.models.config import TimmConfig
from illama.models.norms import LayerNorm, RMSNorm
from illama.models.timm_vit import LatentPool, to_causal, to_quantizable
from illama.structured_files import parse_json
from quant.quantizers.rotation import rotate
from quant.quantizers.smoothquant import smooth
from quant.schemes.formats import TensorSpec
from quant.schemes.scheme import Rotations, Scheme

KINDS = ("post_softmax", "pre_softmax")
FORMS = ("plain", "fused", None)
VARIANTS = pytest.mark.parametrize("name", [*OPTIONS, *NAMED, "gated_odd_heads"])


def reference(vit, alpha, kind):
    """Returns a copy of the ORIGINAL with the paper's attention and timm's order of tokens.

    Written without the code under test: each token has a rank, and S compares ranks.
    """
    vit = copy.deepcopy(vit)
    has_class, prefix = int(vit.cls_token is not None), vit.num_prefix_tokens

    def attend(attn, x):
        batch, tokens, _ = x.shape
        patches = tokens - prefix
        rank = [tokens - 1] * has_class + list(range(patches, tokens - has_class)) + list(range(patches))
        rank = torch.tensor(rank)
        seen = torch.where(rank[None, :] <= rank[:, None], 1.0, alpha).to(x)
        q, k, v = attn.qkv(x).view(batch, tokens, 3, attn.num_heads, -1).unbind(2)
        q, k = attn.q_norm(q), attn.k_norm(k)
        weights = torch.einsum("bihd,bjhd->bhij", q, k).div(q.shape[-1] ** 0.5).exp()
        if kind == "pre_softmax":
            weights = weights * seen
        weights = weights / weights.sum(-1, keepdim=True)
        if kind == "post_softmax":
            weights = weights * seen
        y = attn.norm(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, tokens, -1))
        if getattr(attn, "gate", None) is not None:
            y = y * torch.sigmoid(attn.gate(x))
        return attn.proj(y)

    for attn in [module for module in vit.modules() if type(module) is Attention]:
        attn.forward = lambda x, attn=attn, **_: attend(attn, x)
    return vit


@VARIANTS
def test_at_alpha_1_the_causal_network_equals_the_original(name):
    vit, images = build(name), images_for(name)
    before = copy.deepcopy(vit.state_dict())
    model = to_causal(vit)
    model.soft_mask = 1.0
    with torch.no_grad():
        expected, features = vit(images), vit.forward_features(images)
        for form in FORMS:
            model.set_attention_form(form)
            assert (model(images) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
            assert (model.forward_features(images) - features).abs().max() < 1e-5 * features.abs().max()
        model.soft_mask = 0.0
        assert (model(images) - expected).abs().max() > 1e-3, "nothing in this network depends on the mask"
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


@VARIANTS
def test_a_quantizable_network_equals_the_original(name):
    """Its values and gradients are equal in both forms of attention and for every alpha, since it has no mask."""
    vit, images = build(name), images_for(name)
    model = to_quantizable(vit)
    assert list(model.vit.state_dict()) == list(vit.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), vit.parameters(), strict=True))
    expected, features = vit(images), vit.forward_features(images)
    expected.square().mean().backward()
    for form in FORMS:
        for alpha in (0.0, 0.5):
            model.set_attention_form(form)
            model.soft_mask = alpha
            model.zero_grad()
            logits = model(images)
            assert (logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
            assert (model.forward_features(images) - features).abs().max() < 1e-5 * features.abs().max()
            logits.square().mean().backward()
            for one, other in zip(model.parameters(), vit.parameters(), strict=True):
                assert (one.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max() + 1e-6


@VARIANTS
@torch.no_grad()
def test_smoothquant_does_not_change_the_output(name):
    vit, images = build(name), images_for(name)
    model = to_quantizable(vit)
    smooth(model, Scheme("all", {"*.input": TensorSpec("int8")}, {"*": 0.5}), [images])
    expected = vit(images)
    assert (model(images) - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("make", [to_causal, to_quantizable])
def test_the_config_describes_the_network(make):
    mask = "post_softmax" if make is to_causal else "bidirectional"
    config = make(build("vit_small_patch14_dinov2")).config
    assert config == TimmConfig("vit_small_patch14_dinov2", 32, 3, 5, mask)
    assert parse_json(json.dumps(config.to_dict()), TimmConfig, "x") == config
    grey = VisionTransformer(**{**SMALL, "img_size": 16}, in_chans=1)
    assert make(grey).config == TimmConfig("VisionTransformer", 16, 1, 5, mask)
    for wrong in ({**config.to_dict(), "depth": 2}, {"name": "vit_tiny_patch16_224"}):
        with pytest.raises(UserError, match="x is damaged"):
            parse_json(json.dumps(wrong), TimmConfig, "x")


@pytest.mark.parametrize("name", ["qk_norm", "scale_norms", "swiglu_rms", "map", "pre_norm"])
def test_every_normalization_is_computed_in_float32(name):
    model = to_quantizable(build(name)).half()
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    assert len(norms) >= 5 and all(isinstance(module, LayerNorm | RMSNorm) for module in norms)
    large = torch.full((1, 3, norms[0].weight.shape[0]), 1000.0, dtype=torch.float16)
    large[..., ::2] *= -1  # the squares exceed float16
    assert norms[0](large).abs().max() > 0.1


def test_norms_without_weights_are_not_changed():
    plain = torch.nn.LayerNorm
    vit = VisionTransformer(**SMALL, norm_layer=lambda *a, **k: plain(*a, **k, elementwise_affine=False)).eval()
    with torch.no_grad():
        torch.testing.assert_close(to_quantizable(vit)(images := images_for("")), vit(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"pool_type": "avg"},
        {"pool_type": ""},
        {"pos_embed": "abs", "feat_size": 16},
        {"qk_norm": True},
        {"q_proj": False},
        {"out_features": 0},
        {"norm_layer": torch.nn.LayerNorm},
    ],
)
def test_a_latent_pool_equals_timm_s(options):
    pool = randomise(AttentionPoolLatent(32, num_heads=2, latent_len=3, **options))
    own, tokens = LatentPool(copy.deepcopy(pool)), torch.randn(2, 16, 32)
    assert list(own.state_dict()) == list(pool.state_dict())
    for form in FORMS:
        own.core.form = form
        torch.testing.assert_close(own(tokens), pool(tokens), atol=1e-5, rtol=1e-5)


@VARIANTS
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_the_paper_s_equation(name, kind):
    vit, images = build(name).double(), images_for(name).double()
    model = to_causal(vit, kind)
    for alpha in (0.0, 0.25, 1.0):
        original = reference(vit, alpha, kind)
        expected = original(images)
        expected.square().mean().backward()
        model.soft_mask = alpha
        for form in FORMS:
            model.set_attention_form(form)
            model.zero_grad()
            logits = model(images)
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
            logits.square().mean().backward()
            for (key, one), other in zip(model.vit.named_parameters(), original.parameters(), strict=True):
                assert one.grad is not None, key
                torch.testing.assert_close(one.grad, other.grad, atol=1e-8, rtol=1e-7, msg=key)


def test_gradients_reach_every_parameter():
    model = to_causal(build("vit_small_patch14_reg4_dinov2").train())
    model.soft_mask = 0.5
    model(images_for("")).square().sum().backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_does_not_see_later_patches_and_the_class_token_sees_all(kind):
    model = to_causal(build("registers"), kind)
    blocks = []
    model.vit.blocks[0].register_forward_hook(lambda _, __, output: blocks.append(output))
    images = images_for("").requires_grad_()
    changed = images.detach().clone()
    changed[:, :, 16:24, 8:16] += 1.0  # patch 9 of 4 x 4, in raster order
    outputs = [model.forward_features(images), model.forward_features(changed)]
    moved = (blocks[0] - blocks[1]).abs().amax(dim=(0, 2))
    earlier, itself_and_later = moved[:9], moved[9:]
    assert itself_and_later.min() > 1e-3  # the later patches, the registers, the class token
    if kind == "pre_softmax":
        assert earlier.max() < 1e-6
        assert (outputs[0] - outputs[1])[:, 5:14].abs().max() < 1e-5  # after all blocks, without 5 prefix tokens
    else:
        assert earlier.min() > 1e-4  # with the paper's mask, future tokens are part of the denominator
    outputs[0][:, 0].sum().backward()
    seen = images.grad.abs().amax(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).amax(dim=(-2, -1))
    assert seen.min() > 1e-6


@pytest.mark.parametrize("patch_drop_rate", [0.0, 0.5])
def test_patches_stay_in_raster_order_before_registers_and_class_token(patch_drop_rate):
    vit = VisionTransformer(**SMALL, reg_tokens=2, patch_drop_rate=patch_drop_rate).train()
    with torch.no_grad():
        vit.patch_embed.proj.weight.zero_()
        vit.cls_token.zero_()
        vit.reg_token.zero_()
        vit.pos_embed.copy_(torch.arange(19.0)[:, None].expand(19, 32))
    model = to_causal(vit)
    inputs = []
    model.vit.blocks[0].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0, :, 0]))
    model(torch.randn(1, 3, 32, 32))
    *patches, register_1, register_2, class_token = inputs[0].round().int().tolist()
    assert (class_token, register_1, register_2) == (0, 1, 2)
    assert len(patches) == 16 * (1 - patch_drop_rate)
    assert patches == sorted(patches)


@pytest.mark.parametrize("rate", ["drop_path_rate", "drop_rate", "pos_drop_rate", "patch_drop_rate"])
def test_random_parts_draw_as_in_timm_in_training(rate):
    vit = randomise(VisionTransformer(**SMALL, reg_tokens=2, **{rate: 0.5})).train()
    model = to_causal(vit)
    model.soft_mask = 1.0
    images = torch.randn(8, 3, 32, 32)
    outputs = []
    for network in (vit, model):
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append(network(images))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2
    assert (outputs[2] - outputs[0]).abs().max() < 1e-4
    assert (outputs[3] - outputs[1]).abs().max() < 1e-4
    torch.testing.assert_close(model.eval()(images), vit.eval()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["proj_drop", "attn_drop"])
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_dropouts_of_attention_are_active_in_training_only(part, form):
    vit, images = build("plain"), images_for("")
    getattr(vit.blocks[0].attn, part).p = 0.5  # set here, since timm's proj_drop_rate applies to the MLP, too
    model = to_causal(vit)
    model.set_attention_form(form)
    assert torch.equal(model(images), model(images))
    model.train()
    assert (model(images) - model(images)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [*KINDS, "bidirectional"])
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_attention_dropout_keeps_the_mean(kind, form):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    mask = AttentionMask(kind, torch.ones(5, 5, dtype=torch.bool).tril(), torch.tensor(0.5))
    attention = MaskedAttention()
    attention.form = form
    dropped = attention(*(x.expand(20000, -1, -1, -1) for x in (q, k, v)), mask, dropout=0.5)
    assert dropped.std(dim=0).min() > 0.01
    assert (dropped.mean(dim=0) - attention(q, k, v, mask)).abs().max() < 0.05


def test_weights_are_saved_and_loaded_under_timm_s_names(tmp_path):
    vit = build("registers")
    model, images = to_causal(vit), images_for("")
    assert list(model.vit.state_dict()) == list(vit.state_dict())
    assert list(model.state_dict()) == [f"vit.{key}" for key in vit.state_dict()]
    with torch.no_grad():
        model.vit.head.weight.add_(1.0)  # as if trained
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    save_file(model.vit.state_dict(), tmp_path / "timm.safetensors")
    fresh = VisionTransformer(**SMALL, reg_tokens=4)
    whole = to_causal(fresh)
    whole.load_state_dict(load_file(tmp_path / "whole.safetensors"))
    fresh.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    expected = model(images)
    assert torch.equal(whole.eval()(images), expected)
    assert torch.equal(to_causal(fresh.eval())(images), expected)


def test_the_mode_and_frozen_weights_are_kept():
    vit = build("plain")
    vit.patch_embed.requires_grad_(False)
    vit.blocks[1].train()
    model = to_causal(vit)
    assert not model.training and not model.vit.blocks[0].attn.training and model.vit.blocks[1].attn.training
    frozen = {key for key, parameter in model.vit.named_parameters() if not parameter.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_gradient_checkpointing_changes_nothing():
    gradients, runs = [], []
    for enabled in (False, True):
        model = to_causal(build("plain").train())
        model.soft_mask = 0.5
        model.vit.set_grad_checkpointing(enabled)
        model.vit.blocks[0].attn.register_forward_hook(lambda *_, enabled=enabled: runs.append(enabled))
        torch.manual_seed(1)
        model(images_for("")).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert runs == [False, True, True], "a checkpointed block runs again in the backward pass"
    torch.testing.assert_close(*gradients)


def test_timm_s_own_methods_work_on_the_inner_network():
    model = to_causal(build("registers"))
    model.vit.reset_classifier(7)
    model.vit.set_input_size((48, 40))
    assert model(torch.randn(1, 3, 48, 40)).shape == (1, 7)


def test_distilled_training_gives_both_heads():
    model = to_causal(randomise(VisionTransformerDistilled(**SMALL)).train())
    model.vit.set_distilled_training()
    assert [tuple(logits.shape) for logits in model(images_for(""))] == [(2, 5), (2, 5)]


def test_the_soft_mask_is_in_0_to_1_and_starts_hard():
    model = to_causal(build("plain"))
    assert model.soft_mask == 0.0
    model.soft_mask = 0.25
    assert model.soft_mask == 0.25
    for alpha in (-0.1, 1.5):
        with pytest.raises(ValueError, match="alpha"):
            model.soft_mask = alpha


class OwnFeatures(VisionTransformer):
    def forward_features(self, x, **_):
        return super().forward_features(x) * 2


def other_scale():
    vit = VisionTransformer(**SMALL)
    vit.blocks[1].attn.scale = 1.0
    return vit


@pytest.mark.parametrize(
    ("make", "identifier"),
    [
        (lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1), "VisionTransformerRelPos.*relative"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1, embed_dim=32, num_heads=2), "Beit.*bias"),
        (lambda: torch.nn.Linear(2, 2), "Linear.*VisionTransformer.*Eva"),
        (lambda: to_causal(VisionTransformer(**SMALL)), "CausalVisionTransformer"),
        (lambda: to_causal(VisionTransformer(**SMALL)).vit, "CausalAttention"),
        (lambda: OwnFeatures(**SMALL), "forward_features"),
        (lambda: VisionTransformer(**SMALL, block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
        (lambda: VisionTransformer(**SMALL, attn_layer="diff"), "DiffAttention"),
        (other_scale, "scale 1.0"),
    ],
)
def test_networks_that_cannot_be_converted_exactly_are_rejected(make, identifier):
    for take, refusal in ((to_causal, "cannot make this "), (to_quantizable, "cannot quantize this ")):
        with pytest.raises(UserError, match=identifier) as caught:
            take(make())
        assert str(caught.value).startswith(refusal) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
@torch.no_grad()
def test_a_hybrid_with_a_resnet_is_made_causal_and_quantizable(name, size):
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": size, "num_classes": 5}
    hybrid = randomise(timm.create_model(name, **options))
    model, images = to_causal(hybrid), torch.randn(2, 3, size, size)
    model.soft_mask = 1.0
    assert model.config.in_channels == 3
    torch.testing.assert_close(model(images), hybrid(images), atol=1e-4, rtol=1e-4)
    plain = to_quantizable(hybrid)
    torch.testing.assert_close(plain(images), hybrid(images), atol=1e-4, rtol=1e-4)
    assert {type(each) for each in plain.modules() if isinstance(each, torch.nn.Conv2d)} == {torch.nn.Conv2d}
    rotated = copy.deepcopy(plain).double()
    rotate(rotated, Rotations(residual=True, values=True))
    torch.testing.assert_close(rotated(images.double()), plain.double()(images.double()), atol=1e-9, rtol=1e-9)


def test_another_convolutional_network_is_refused_in_a_line():
    with torch.device("meta"):
        vitamin = timm.create_model("vitamin_small_224", depth=1)
    assert to_causal(vitamin).config.in_channels == 3
    with pytest.raises(UserError, match="MbConvStages") as caught:
        to_quantizable(vitamin)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_an_unknown_mask_is_rejected(mask):
    with pytest.raises(UserError, match=mask):
        to_causal(VisionTransformer(**SMALL), mask)


def test_the_inner_network_cannot_be_called():
    with pytest.raises(UserError, match=r"\.vit"):
        to_causal(build("plain")).vit(images_for(""))
