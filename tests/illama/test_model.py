"""The network, compared with the released code's outputs, float64, and published sizes."""

import json

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from illama import ILLaMA, ModelConfig
from illama.errors import UserError
from illama.models.attention import AttentionMask, MaskedAttention
from illama.models.config import VARIANTS
from illama.models.illama import rotary_table, rotate
from illama.models.norms import LayerNorm, RMSNorm
from illama.structured_files import parse_json

ALPHAS = (0.0, 0.25, 1.0)
KINDS = ("post_softmax", "pre_softmax", "bidirectional")


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("form", ["plain", "fused", None])
@pytest.mark.parametrize("readout_only", [True, False])
def test_matches_the_released_code(parity, alpha, form, readout_only):
    model = parity.model()
    model.set_attention_form(form)
    model.soft_mask, model.readout_only = alpha, readout_only
    with torch.no_grad():
        logits = model(parity.input)
        features = model.forward_head(model.forward_features(parity.input), pre_logits=True)
    assert (logits - parity.tensors[f"logits.alpha_{alpha}"]).abs().max() < 1e-5
    assert (features - parity.tensors[f"features.alpha_{alpha}"]).abs().max() < 1e-5


def test_a_pre_softmax_mask_is_another_function(wide_parity):
    """The usual causal mask runs a released checkpoint without an error, but gives wrong results."""
    config = ModelConfig(**{**wide_parity.config.to_dict(), "mask": "pre_softmax"})
    model = ILLaMA(config).eval()
    model.load_state_dict(wide_parity.state)
    with torch.no_grad():
        error = (model(wide_parity.input) - wide_parity.tensors["logits.alpha_0.0"]).abs().max()
    assert error > 1e-3


@pytest.mark.parametrize(
    ("size", "millions", "giga_macs"),
    [("tiny", 5.7, 1.3), ("small", 21.9, 4.6), ("base", 86.3, 17.6), ("large", 310.2, 62.8)],
)
def test_published_sizes(size, millions, giga_macs):
    with torch.device("meta"):
        model = ILLaMA(ModelConfig.preset(size)).eval()
        model.readout_only = False
        model.set_attention_form("plain")
        images = torch.zeros(1, 3, 224, 224)
    # The paper counts Linears and the convolution, without tables and norms, as a profiler does.
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    counted = sum(p.numel() for layer in layers for p in layer.parameters())
    assert round(counted / 1e6, 1) == millions
    tables_and_norms = (197 + 1 + 2 * model.config.depth + 1) * model.config.width
    assert sum(p.numel() for p in model.parameters()) == counted + tables_and_norms
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, abs=0.06)


def _equation_2(q, k, v, alpha, kind):
    """Computes equations 1 and 2 of the paper in NumPy, independently of the code under test."""
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    tokens = scores.shape[-1]
    seen = alpha + (1 - alpha) * np.tril(np.ones((tokens, tokens)))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    if kind == "pre_softmax":
        weights = weights * seen
    weights = weights / weights.sum(-1, keepdims=True)
    if kind == "post_softmax":
        weights = weights * seen
    return weights @ v


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 20),
    head_dim=st.integers(1, 8),
    alpha=st.one_of(st.sampled_from(ALPHAS), st.floats(0, 1)),
    kind=st.sampled_from(KINDS),
    form=st.sampled_from(["plain", "fused"]),
    one_row=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_both_forms_are_the_paper_s_equations(tokens, head_dim, alpha, kind, form, one_row, seed):
    q, k, v = np.random.default_rng(seed).normal(size=(3, 2, 3, tokens, head_dim))
    expected = _equation_2(q, k, v, alpha, kind)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = AttentionMask("bidirectional" if alpha == 1 else kind, causal, torch.tensor(alpha, dtype=torch.float64))
    queries = torch.from_numpy(q)
    if one_row:
        row = seed % tokens
        queries, expected = queries[:, :, row : row + 1], expected[:, :, row : row + 1]
        mask = mask.row(row, sees_all=row == tokens - 1 or mask.kind == "bidirectional")
    attention = MaskedAttention()
    attention.form = form
    result = attention(queries, torch.from_numpy(k), torch.from_numpy(v), mask)
    if kind == "bidirectional":
        expected = _equation_2(q, k, v, 1.0, "post_softmax")
        expected = expected[:, :, row : row + 1] if one_row else expected
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("class_token", ["last", "first"])
@pytest.mark.parametrize("position", ["learnable", "rope", "both"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_computing_only_the_class_token_is_exact(kind, class_token, position, alpha):
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=16,
        patch_size=4,
        width=32,
        depth=2,
        heads=2,
        num_classes=5,
        mask=kind,
        class_token=class_token,
        position=position,
    )
    model = ILLaMA(config).double().eval()
    model.soft_mask = alpha
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    results = []
    for form in ("plain", "fused"):
        for readout_only in (True, False):
            model.readout_only = readout_only
            model.set_attention_form(form)
            results.append(model(images))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-9, rtol=0)


def test_readout_only_does_not_change_the_gradients(wide_parity):
    gradients = []
    for readout_only in (True, False):
        model = wide_parity.model().double()
        model.readout_only = readout_only
        model(wide_parity.input.double()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_class_token_at_the_front_depends_on_nothing():
    """The attention collapse of the paper's Table 17: logits do not depend on the image."""
    torch.manual_seed(0)
    model = ILLaMA(ModelConfig.preset("nano", class_token="first", mask="pre_softmax")).eval()
    with torch.no_grad():
        one, other = model(torch.randn(2, 1, 28, 28))
    torch.testing.assert_close(one, other)


@given(shift=st.integers(0, 20), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_rope_depends_only_on_distance_and_keeps_length(shift, seed):
    torch.manual_seed(seed)
    table = rotary_table(40, 8).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(i, j):
        return (rotate(q, table[:, i : i + 1]) * rotate(k, table[:, j : j + 1])).sum()

    torch.testing.assert_close(product(3, 11), product(3 + shift, 11 + shift), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rotate(q, table[:, 5:6]).norm(), q.norm(), atol=1e-6, rtol=1e-6)


def test_rope_matches_complex_multiplication():
    torch.manual_seed(0)
    x, table = torch.randn(2, 3, 10, 8), rotary_table(10, 8)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(*table)
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(turned).flatten(-2))


def test_public_interface():
    config = ModelConfig(image_size=224, patch_size=16, in_channels=3, width=192, depth=12, heads=3, num_classes=1000)
    assert config == ModelConfig.preset("tiny")
    model = ILLaMA(ModelConfig.preset("tiny", num_classes=10, image_size=32))
    model.soft_mask = 0.25
    assert model.soft_mask == 0.25
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="alpha"):
        model.soft_mask = 1.5


def test_timm_has_the_sizes():
    model = timm.create_model("illama_tiny", num_classes=7, img_size=32, in_chans=1, drop_path_rate=0.1)
    assert isinstance(model, ILLaMA)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 7)
    assert {f"illama_{size}" for size in ("nano", "tiny", "small", "base", "large")} <= set(timm.list_models("illama*"))
    with pytest.raises(UserError, match="load_checkpoint"):
        timm.create_model("illama_tiny", pretrained=True)


@pytest.mark.parametrize(
    ("settings_", "identifier"),
    [
        ({"image_size": 30}, "patch_size"),
        ({"heads": 5}, "heads"),
        ({"depth": 0}, "depth"),
        ({"width": 1.5}, "width"),
        ({"mask": "causal"}, "mask"),
        ({"color": 3}, "color"),
    ],
)
def test_a_wrong_config_is_rejected(settings_, identifier):
    with pytest.raises(UserError, match=identifier):
        parse_json(json.dumps(settings_), ModelConfig, "config.json")


def test_an_unknown_size_is_rejected():
    with pytest.raises(UserError, match="'huge'"):
        ModelConfig.preset("huge")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_fused_half_precision_on_a_gpu(wide_parity, dtype, alpha):
    model = wide_parity.model().to("cuda", dtype)
    model.set_attention_form("fused")
    model.soft_mask = alpha
    with torch.no_grad():
        logits = model(wide_parity.input.to("cuda", dtype)).float().cpu()
    expected = wide_parity.tensors[f"logits.alpha_{alpha}"]
    assert (logits - expected).norm() / expected.norm() < 2e-2


def _randomized(config):
    """Returns a network with random norms, biases and tables."""
    torch.manual_seed(0)
    model = ILLaMA(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def test_the_first_step_equals_timm_s_vit():
    model = _randomized(ModelConfig.preset("nano", "vit", in_channels=3))
    vit = VisionTransformer(img_size=28, patch_size=4, embed_dim=128, depth=6, num_heads=2, num_classes=10).eval()
    vit.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = vit(images)
        assert (model(images) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_readout_only_and_export_are_exact_for_every_step(variant):
    model = _randomized(ModelConfig.preset("nano", variant, depth=2))
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        for alpha in (0.0, 0.3, 1.0):
            model.soft_mask = alpha
            logits = []
            for model.readout_only in (True, False):
                for form in ("plain", "fused"):
                    model.set_attention_form(form)
                    logits.append(model(images))
            for other in logits[1:]:
                assert (other - logits[0]).abs().max() < 1e-4 * logits[0].abs().max()


@pytest.mark.parametrize(
    ("variant", "blind"),
    [("causal-collapse", True), ("causal-collapse-post-softmax", False), ("causal-modified", False), ("causal", False)],
)
def test_a_class_token_at_the_front_collapses_with_the_usual_mask(variant, blind):
    """The paper's attention collapse; with a mask after the softmax, it still depends on the denominators."""
    model = _randomized(ModelConfig.preset("nano", variant))
    with torch.no_grad():
        one, other = model(torch.randn(2, 1, 28, 28))
    assert torch.equal(one, other) == blind


def test_dropout_and_stochastic_depth_are_active_in_training_only():
    config = ModelConfig.preset("nano", depth=2)
    images = torch.randn(4, 1, 28, 28)
    for options in ({"dropout": 0.5}, {"drop_path": 0.5}):
        model = ILLaMA(config, **options)
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


def test_the_backward_pass_of_rms_norm_is_correct():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    norm = RMSNorm(8, eps=1e-6).double()
    norm.weight.data.copy_(weight)
    assert torch.autograd.gradcheck(norm, x.requires_grad_())
    assert torch.autograd.gradcheck(lambda w: functional_call(norm, {"weight": w}, (x,)), weight.requires_grad_())
    with torch.no_grad():
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        assert (norm(x) - expected).abs().max() < 1e-12
    assert (norm(x) - expected).abs().max() < 1e-12


def test_norms_stay_in_float32_under_autocast():
    x = torch.randn(4, 50, 128) * 300
    for norm in (RMSNorm(128, eps=1e-6), LayerNorm(128, eps=1e-6)):
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = norm(x)
        assert under_autocast.dtype == torch.float32
        assert (under_autocast - norm.double()(x.double())).abs().max() < 1e-5


def test_rotation_is_the_same_with_and_without_compiling():
    rotation, x = rotary_table(7, 6), torch.randn(2, 3, 7, 6, dtype=torch.float64)
    program = torch.export.export(_Rotate(), (x, rotation))
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert values and not any(value.is_complex() for value in values)
    assert (program.module()(x, rotation) - rotate(x, rotation)).abs().max() < 1e-12


class _Rotate(torch.nn.Module):
    def forward(self, x, rotation):
        return rotate(x, rotation)
