"""iLLaMAs where timm's models are expected: timm's factory, torchvision's extractor, segmentation_models_pytorch."""

import copy

import pytest
import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor

import illama.models  # noqa: F401  (registers the networks)
from illama.checkpoints.load import load_checkpoint, write_weights
from illama.errors import UserError
from illama.models.config import ModelConfig
from illama.models.illama import ILLaMA
from illama.models.upernet import SegmentationConfig, UperNet

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def create(**options):
    torch.manual_seed(0)
    model = timm.create_model("illama_tiny", **{**SMALL, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def outputs_of_blocks(model, images):
    """The tokens after each block, from hooks, with the class token first."""
    model, seen = copy.deepcopy(model), []
    model.readout_only = False
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    model(images)
    last = model.config.class_token == "last"
    return [torch.cat([x[:, -1:], x[:, :-1]], 1) if last else x for x in seen]


@pytest.mark.parametrize("class_token", ["last", "first"])
@pytest.mark.parametrize("mask", ["post_softmax", "pre_softmax", "bidirectional"])
@pytest.mark.parametrize("pool", ["token", "avg"])
@torch.no_grad()
def test_features_and_head_give_the_logits(class_token, mask, pool):
    model = create(class_token=class_token, mask=mask, global_pool=pool, drop_rate=0.5, proj_drop_rate=0.5)
    tokens = model.forward_features(IMAGES)
    torch.testing.assert_close(model.forward_head(tokens), model(IMAGES))
    torch.testing.assert_close(tokens, model.norm(outputs_of_blocks(model, IMAGES)[-1]))
    pooled = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    torch.testing.assert_close(model.head(pooled), model(IMAGES))


@pytest.mark.parametrize("class_token", ["last", "first"])
@torch.no_grad()
def test_intermediates_are_the_outputs_of_the_blocks(class_token):
    model = create(class_token=class_token)
    blocks = outputs_of_blocks(model, IMAGES)
    final, found = model.forward_intermediates(IMAGES, [0, 2], return_prefix_tokens=True, stop_early=False)
    torch.testing.assert_close(final, model.forward_features(IMAGES))
    for (feature_map, token), exact in zip(found, (blocks[0], blocks[2]), strict=True):
        torch.testing.assert_close(feature_map.flatten(2).mT, exact[:, 1:])
        torch.testing.assert_close(token, exact[:, :1])
    (last,) = model.get_intermediate_layers(IMAGES, norm=True)
    torch.testing.assert_close(last, model.norm(blocks[-1])[:, 1:])
    features = timm.create_model(
        "illama_tiny", **SMALL, class_token=class_token, features_only=True, out_indices=(1, 3)
    )
    features.model.load_state_dict(model.state_dict(), strict=False)
    for feature_map, exact in zip(features.eval()(IMAGES), (blocks[1], blocks[3]), strict=True):
        torch.testing.assert_close(feature_map.flatten(2).mT, exact[:, 1:])
    assert features.feature_info.channels() == [32, 32] and features.feature_info.reduction() == [8, 8]
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(IMAGES, output_fmt="NHWC")


@torch.no_grad()
def test_pruned_networks_give_the_same_intermediates():
    model = create()
    exact = model.forward_intermediates(IMAGES, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(model.blocks) == model.config.depth == 2
    for found, expected in zip(model.forward_intermediates(IMAGES, intermediates_only=True), exact, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_classifier_can_be_replaced():
    model = create()
    assert model.get_classifier() is model.head and model.num_classes == 7
    model.double().reset_classifier(3)
    assert model(IMAGES.double()).shape == (2, 3) and model.config.num_classes == 3
    model.float().reset_classifier(0)
    assert model(IMAGES).shape == (2, 32) and model.config.features == (32,)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(IMAGES), model.forward_features(IMAGES))
    assert model.config.features == (17, 32)
    with pytest.raises(UserError, match="global_pool"):
        model.reset_classifier(3)
    assert create(num_classes=0, global_pool="avg")(IMAGES).shape == (2, 32)


def segmentation_network():
    pytest.importorskip("segmentation_models_pytorch")
    config = SegmentationConfig(32, 8, width=32, depth=4, heads=2, num_classes=3, decoder_channels=8)
    return UperNet(config, drop_path=0.5)


@pytest.mark.parametrize("make", [lambda: create(drop_path_rate=0.5, proj_drop_rate=0.2), segmentation_network])
def test_checkpointed_gradients_are_the_same(make):
    """The blocks run again in the backward pass, with the same random numbers."""
    gradients, runs = [], []
    for enable in (False, True):
        torch.manual_seed(1)
        model, count = make().train(), []
        model.blocks[1].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        model(IMAGES).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        runs.append(len(count))
    assert runs == [1, 2]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_segmentation_network_has_no_head_for_tokens():
    model = segmentation_network()
    for call in (lambda: model.reset_classifier(3), lambda: model.prune_intermediate_layers([0])):
        with pytest.raises(UserError, match="decoder"):
            call()
    assert len(model.blocks) == 4
    with pytest.raises(UserError, match="global_pool"):
        SegmentationConfig(global_pool="avg")


def test_attributes():
    model = create()
    assert (model.num_features, model.embed_dim, model.head_hidden_size, model.in_chans) == (32, 32, 32, 3)
    assert model.patch_embed.grid_size == (4, 4) and model.patch_embed.num_patches == 16
    assert model.default_cfg["classifier"] == "head" and timm.data.resolve_data_config(model=model)["crop_pct"] == 0.875
    ours = timm.create_model("illama_nano", image_size=56, in_channels=2, width=64, heads=4, depth=1)
    assert (ours.config.image_size, ours.config.in_channels, ours.config.width, ours.config.heads) == (56, 2, 64, 4)
    for wrong, message in (
        ({"img_size": (32, 48)}, "image_size"),
        ({"global_pool": "map"}, "global_pool"),
        ({"features_only": True, "feature_cls": "hook"}, "feature_cls"),
    ):
        with pytest.raises(UserError, match=message):
            create(**wrong)
    for wrong, message in ({"window_size": 7}, "window_size"), ({"image_size": 64}, "img_size"):
        with pytest.raises(TypeError, match=message):
            create(**wrong)
    meta = timm.create_model("illama_nano", device="meta", dtype=torch.bfloat16)
    assert {(each.device.type, each.dtype) for each in meta.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("mask", ["post_softmax", "pre_softmax"])
@torch.no_grad()
def test_torchvision_extracts_features(mask, norm):
    model = create(mask=mask, norm=norm)
    model.readout_only = False
    found = create_feature_extractor(model, {"blocks.1": "middle", "blocks.3": "last", "head": "logits"})(IMAGES)
    blocks = outputs_of_blocks(model, IMAGES)
    for name, exact in ("middle", blocks[1]), ("last", blocks[3]):
        torch.testing.assert_close(torch.cat([found[name][:, -1:], found[name][:, :-1]], 1), exact)
    torch.testing.assert_close(found["logits"], model(IMAGES))
    model.readout_only = True
    torch.testing.assert_close(create_feature_extractor(model, {"blocks.3": "last"})(IMAGES)["last"], blocks[3][:, :1])


@torch.no_grad()
def test_segmentation_models_pytorch_takes_it_as_an_encoder():
    smp = pytest.importorskip("segmentation_models_pytorch")
    network = smp.DPT("tu-illama_nano", encoder_weights=None, in_channels=1, classes=4, img_size=32).eval()
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 4, 32, 32)


def test_an_unpooled_network_has_no_classes():
    with pytest.raises(UserError, match="global_pool"):
        ILLaMA(ModelConfig(global_pool="", num_classes=3))


@torch.no_grad()
def test_the_pooling_of_a_file_is_its_own(tmp_path):
    """Weights do not show it; a file without a config has the paper's."""
    model = create(global_pool="avg")
    write_weights(model.state_dict(), model.config, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors").model
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    with pytest.raises(UserError, match="global_pool"):
        load_checkpoint(tmp_path / "model.pth", config=model.config)
