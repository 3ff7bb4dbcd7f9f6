"""Folders of Hugging Face's transformers: outputs equal to transformers', and what cannot be used."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from illama.checkpoints.huggingface import load_huggingface
from illama.errors import UserError
from illama.models.upernet import TimmSegmentationConfig, TimmUperNet
from illama.options import SourceOptions
from quant.inputs import open_inputs

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = {**SIZE, "intermediate_size": 64}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FIVE = {"num_labels": 5}
Vit, Deit, Dino = transformers.ViTConfig, transformers.DeiTConfig, transformers.Dinov2Config
Dino3, Siglip, Clip = transformers.DINOv3ViTConfig, transformers.SiglipVisionConfig, transformers.CLIPVisionConfig
# Name -> (network, head, what it computes from images).
NETWORKS = {
    "vit": (transformers.ViTForImageClassification, Vit(**MLP, **FIVE), "classes", "logits"),
    "vit, base": (transformers.ViTModel, Vit(**MLP), "none", "token"),
    "vit, tokens": (transformers.ViTModel, Vit(**MLP, qkv_bias=False), "tokens", "tokens"),
    "vit, without its head": (transformers.ViTForImageClassification, Vit(**MLP, **FIVE), "none", "vit"),
    "deit": (transformers.DeiTForImageClassification, Deit(**MLP, **FIVE), "classes", "logits"),
    "deit, teacher": (transformers.DeiTForImageClassificationWithTeacher, Deit(**MLP, **FIVE), "classes", "logits"),
    "dinov2": (transformers.Dinov2Model, Dino(**SIZE), "none", "pooled"),
    "dinov2, giant": (transformers.Dinov2Model, Dino(**SIZE, use_swiglu_ffn=True), "tokens", "tokens"),
    "dinov2, registers": (
        transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig(**SIZE), "tokens", "tokens"
    ),
    "dinov3": (transformers.DINOv3ViTModel, Dino3(**MLP, num_register_tokens=4), "tokens", "tokens"),
    "dinov3, gated": (
        transformers.DINOv3ViTModel, Dino3(**MLP, use_gated_mlp=True, hidden_act="silu"), "none", "pooled"
    ),
    "siglip": (transformers.SiglipVisionModel, Siglip(**MLP), "none", "pooled"),
    "siglip, tokens": (transformers.SiglipVisionModel, Siglip(**MLP), "tokens", "tokens"),
    "siglip, both towers": (
        transformers.SiglipModel, transformers.SiglipConfig(vision_config=MLP, text_config=TEXT), "none", "siglip"
    ),
    "siglip, classes": (
        transformers.SiglipForImageClassification,
        transformers.SiglipConfig(vision_config=MLP, text_config=TEXT, **FIVE), "classes", "logits",
    ),
    "clip": (transformers.CLIPVisionModel, Clip(**MLP), "none", "pooled"),
    "clip, projection": (
        transformers.CLIPVisionModelWithProjection, Clip(**MLP, projection_dim=12), "embedding", "embedding"
    ),
    "clip, both towers": (
        transformers.CLIPModel,
        transformers.CLIPConfig(vision_config=MLP, text_config=TEXT, projection_dim=12), "embedding", "clip",
    ),
}  # fmt: skip


def theirs(model, images, what):
    """What transformers computes."""
    with torch.no_grad():
        if what == "vit":
            return model.vit(images).last_hidden_state[:, 0]
        if what in ("siglip", "clip"):
            found = model.get_image_features(pixel_values=images)
            return getattr(found, "pooler_output", found)
        found = model(pixel_values=images)
    if what in ("token", "tokens"):
        return found.last_hidden_state[:, 0] if what == "token" else found.last_hidden_state
    return getattr(found, {"pooled": "pooler_output", "embedding": "image_embeds"}.get(what, what))


def saved(folder, name, layers=2, **more):
    """Returns a small network with random weights, and its folder, with its processor's settings."""
    kind, config, head, what = copy.deepcopy(NETWORKS[name])
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, **more)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model, head, what


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_transformers(name, tmp_path):
    model, head, what = saved(tmp_path, name)
    loaded, images = load_huggingface(tmp_path, head=head), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = loaded.model(images)
    expected = theirs(model, images, what)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    config = loaded.model.config
    assert config.features == (() if head == "classes" else tuple(expected.shape[1:]))
    assert loaded.classes == (tuple(f"LABEL_{number}" for number in range(5)) if head == "classes" else ())


@pytest.mark.parametrize("name", ["vit, base", "dinov2", "dinov2, registers", "dinov3", "siglip", "clip"])
def test_another_image_size_is_interpolated_as_in_transformers(name, tmp_path):
    model, head, what = saved(tmp_path, name)
    loaded, images = load_huggingface(tmp_path, image_size=48, head=head), torch.randn(2, 3, 48, 48)
    options = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        whole = model(pixel_values=images, **options)
        expected = theirs(lambda pixel_values: whole, images, what)
        assert (loaded.model(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert loaded.preprocessing.size == (48, 48)


@pytest.mark.parametrize(
    "name", ["vit", "deit, teacher", "dinov2, giant", "dinov2, registers", "dinov3", "siglip", "clip"]
)
def test_its_settings_make_the_backbone_of_a_segmentation_network(name, tmp_path):
    saved(tmp_path, name, layers=4)
    loaded, images = load_huggingface(tmp_path, head="none"), torch.randn(2, 3, 32, 32)
    options, model = json.loads(json.dumps(loaded.options)), loaded.model
    config = TimmSegmentationConfig(model.config.name, 32, 3, 5, options=options, decoder_channels=8)
    network = TimmUperNet(config).eval()
    missing, unknown = network.load_state_dict(model.state_dict(), strict=False)
    assert {each.partition(".")[0] for each in missing} == {"neck", "decoder", "head"}
    assert all(each.startswith("vit.attn_pool.") for each in unknown)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, model.vit.num_prefix_tokens :]
        torch.testing.assert_close(network.block_patches(images, [3])[0], tokens)
        assert network(images).shape == (2, 5, 32, 32)
    for changes, words in (
        ({"image_size": 32 * 8000}, "square"), ({"image_size": -32}, "make no network|square|multiple"),
        ({"image_size": 36}, "multiple"),
        ({"options": {**options, "num_attention_heads": 3}}, "heads"), ({"in_channels": 1}, "channels"),
        ({"options": {**options, "mlp_ratio": 1.7e308}}, "make no network"),
    ):  # fmt: skip
        with torch.device("meta"), pytest.raises(UserError, match=words):
            TimmUperNet(replace(config, **changes))


def test_shards_and_pickles_are_read(tmp_path):
    model, head, what = saved(tmp_path / "shards", "dinov2", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "pickle").mkdir()
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    state = {}
    for path in (tmp_path / "shards").glob("*.safetensors"):
        state |= load_file(path)
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(tmp_path / "shards" / file, tmp_path / "pickle" / file)
    torch.save(state, tmp_path / "pickle" / "pytorch_model.bin")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        one, other = (load_huggingface(tmp_path / each, head=head) for each in ("shards", "pickle"))
        torch.testing.assert_close(one.model(images), theirs(model, images, what), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.model(images), one.model(images))
    assert len(one.digests()) > 4 and len(other.digests()) == 3


@pytest.mark.parametrize(
    ("processor", "steps"),
    [
        (transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=2), (None, "bilinear")),
        (transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size=32, resample=3), (40, "bicubic")),
        (transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), (32, "bicubic")),
        (transformers.SiglipImageProcessor(size={"height": 32, "width": 32}), (None, "bicubic")),
    ],
)
def test_images_are_prepared_as_in_transformers(processor, steps, tmp_path):
    saved(tmp_path, "vit")
    processor.save_pretrained(tmp_path)
    preprocessing = load_huggingface(tmp_path).preprocessing
    assert (preprocessing.resize, preprocessing.interpolation) == steps
    pixels = torch.randint(0, 256, (50, 70, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for width in (60, 61, 62, 63):  # so that half a pixel is in front of some crops
        image = Image.fromarray(pixels[:, : width - 10].numpy())
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        difference = (preprocessing.transform()(image) - expected).abs()
        assert difference.max() < 2.1 / 255 / min(preprocessing.std)  # rounding of the resize


@pytest.mark.parametrize("name", ["clip", "deit", "vit"])
def test_settings_of_older_versions_mean_what_they_mean_for_their_processor(name, tmp_path):
    """A size that is a number is that of the shorter side for CLIP; CLIP and DeiT crop without being told."""
    kind = {"clip": transformers.CLIPImageProcessor, "deit": transformers.DeiTImageProcessor}.get(
        name, transformers.ViTImageProcessor
    )
    _, head, _ = saved(tmp_path, name)
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    settings = {**means, "size": 40 if name == "deit" else 32, "crop_size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = torch.randint(0, 256, (45, 45 if name == "deit" else 70, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    expected = kind.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    found = load_huggingface(tmp_path, head=head).preprocessing.transform()(image)
    assert (found - expected).abs().max() < 2.1 / 255 / 0.5
    (tmp_path / "preprocessor_config.json").unlink()  # as a processor of images and text is saved
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert torch.equal(load_huggingface(tmp_path, head=head).preprocessing.transform()(image), found)


def edited(folder, file, **changes):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "swin"}, "swin"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_size": "many"}, "config.json"),
        ({"num_hidden_layers": 900}, "config"),
        ({"hidden_size": 60000, "intermediate_size": 60000}, "config"),
        ({"num_hidden_layers": 1}, "config"),
        ({"num_attention_heads": 5}, "5 heads"),
        ({"num_register_tokens": 10**9}, "register"),
        ({"mlp_ratio": -1.0}, "mlp_ratio"),
        ({"patch_size": 5}, "patches"),
        ({"patch_size": 16}, "shape"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, word, tmp_path):
    saved(tmp_path, "vit")
    edited(tmp_path, "config.json", **changes)
    with pytest.raises(UserError, match=word):
        load_huggingface(tmp_path)


@pytest.mark.parametrize("name", ["dinov2, registers", "siglip", "deit, teacher", "clip, projection", "dinov3, gated"])
def test_tensors_that_are_missing_or_of_another_shape_are_refused(name, tmp_path):
    _, head, _ = saved(tmp_path, name)
    state = load_file(tmp_path / "model.safetensors")
    for damaged in state:
        if "mask_token" in damaged or ".1." in damaged or not state[damaged].numel():
            continue
        for change in (None, state[damaged].flatten()[:0], torch.tensor(1.0), state[damaged][None, ..., :-1]):
            changed = {key: value if key != damaged else change for key, value in state.items()}
            kept = {key: value.contiguous() for key, value in changed.items() if value is not None}
            save_file(kept, tmp_path / "model.safetensors")
            with pytest.raises(UserError) as caught:
                load_huggingface(tmp_path, head=head)
            assert "\n" not in str(caught.value)


def test_heads_that_are_not_there_are_refused(tmp_path):
    saved(tmp_path, "dinov2")
    for head in ("classes", "embedding"):
        with pytest.raises(UserError, match="--head none"):
            load_huggingface(tmp_path, head=head)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "classifier.weight": torch.zeros(5, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="mean"):
        load_huggingface(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"do_normalize": False},
        {"do_resize": None},
        {"resample": 0},
        {"resample": 1},
        {"size": {"shortest_edge": 32}},
        {"size": {"height": 32, "width": 48}},
        {"image_mean": [0.5]},
    ],
)
def test_processors_that_are_not_supported(changes, tmp_path):
    saved(tmp_path, "vit")
    edited(tmp_path, "preprocessor_config.json", **changes)
    with pytest.raises(UserError):
        load_huggingface(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="preprocessor_config"):
        load_huggingface(tmp_path)


def test_a_folder_needs_no_option_and_runs_no_code(tmp_path):
    saved(tmp_path / "network", "vit")
    edited(tmp_path / "network", "config.json", auto_map={"AutoModel": "evil.Evil"})
    (tmp_path / "network" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    for model in (None, "hf"):
        inputs = open_inputs(SourceOptions(tmp_path / "network", model, str(tmp_path)), needs_labels=False)
        assert inputs.model.config.name == "vit" and inputs.classes[0] == "LABEL_0"
    with pytest.raises(UserError, match="model-args"):
        open_inputs(SourceOptions(tmp_path / "network", data=str(tmp_path), model_args="a=1"), needs_labels=False)
    assert not (tmp_path / "ran").exists()
