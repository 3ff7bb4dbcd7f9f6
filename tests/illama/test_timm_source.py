"""What comes as a timm checkpoint: training checkpoints, wrapped names, folders of timm's hub, and their settings."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import load_checkpoint as load_by_timm
from timm_networks import randomise, saved

from illama.checkpoints.timm_checkpoint import load_timm, timm_preprocessing
from illama.checkpoints.timm_source import parse_options
from illama.errors import UserError
from illama.options import SourceOptions
from quant.inputs import open_inputs

NAME = "small_vit_plain"


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def network(seed=0, **options):
    torch.manual_seed(seed)
    return randomise(timm.create_model(NAME, num_classes=5, img_size=32, **options))


def equal(model, vit):
    with torch.no_grad():
        return bool((model(images()) - vit(images())).abs().max() < 1e-4)


def test_averaged_weights_are_taken_as_timm_does(tmp_path, capsys):
    last, average = network(1).state_dict(), network(2).state_dict()
    for name, key in (("timm.pth", "state_dict_ema"), ("deit.pth", "model_ema")):
        torch.save({"state_dict": last, "model": last, key: average, "epoch": 3}, tmp_path / name)
        theirs = network(3)
        load_by_timm(theirs, tmp_path / name)
        assert equal(load_timm(NAME, tmp_path / name).model, theirs)
        assert key in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("module.", {}),
        ("_orig_mod.module.", {}),
        ("model.", {"criterion.weight": torch.ones(3)}),  # Lightning
        ("visual.trunk.", {"visual.head.proj.weight": torch.ones(3), "text.ln_final.weight": torch.ones(3)}),
    ],
)
def test_the_names_of_wrappers_are_removed(prefix, others, tmp_path, capsys):
    vit = network()
    state = {prefix + name: value for name, value in vit.state_dict().items()} | others
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    save_file(state, tmp_path / "model.safetensors")
    for file in ("model.pth", "model.safetensors"):
        assert equal(load_timm(NAME, tmp_path / file).model, vit)
        assert prefix in capsys.readouterr().out


def test_a_plain_state_dict_is_taken_without_a_word(tmp_path, capsys):
    vit, path = saved(tmp_path, NAME)
    assert equal(load_timm(NAME, path).model, vit) and capsys.readouterr().out == ""


def test_two_networks_in_a_file_are_refused(tmp_path):
    state = network().state_dict()
    torch.save({f"{who}.{name}": value for who in ("student", "teacher") for name, value in state.items()},
               tmp_path / "both.pth")  # fmt: skip
    with pytest.raises(UserError, match=r"student\., teacher\."):
        load_timm(NAME, tmp_path / "both.pth")


def _with_settings(name, options):
    """A ViT of timm with these options, small."""
    return randomise(timm.create_model(name, num_classes=5, img_size=32, patch_size=8, embed_dim=32, depth=2,
                                       num_heads=2, **options))  # fmt: skip


SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
AVERAGE = {"global_pool": "avg", "fc_norm": False}


def test_the_command_in_a_training_checkpoint_decides_what_weights_cannot(tmp_path):
    """Average pooling without its own norm has the names and shapes of token pooling."""
    vit = _with_settings("vit_tiny_patch16_224", AVERAGE)
    arguments = argparse.Namespace(
        gp="avg", model_kwargs={**SIZES, "fc_norm": False}, mean=[0.1, 0.2, 0.3], std=None, crop_pct=0.5,
        interpolation="bilinear", img_size=None, input_size=[3, 32, 32]
    )  # fmt: skip
    torch.save({"state_dict": vit.state_dict(), "args": arguments}, tmp_path / "last.pth.tar")
    loaded = load_timm("vit_tiny_patch16_224", tmp_path / "last.pth.tar")
    assert equal(loaded.model, vit)
    found = loaded.preprocessing
    assert (found.mean, found.resize, found.interpolation) == ((0.1, 0.2, 0.3), 64, "bilinear")
    assert found.std == tuple(resolve_model_data_config(vit)["std"])


def test_options_of_the_command_line_decide_too(tmp_path):
    vit = _with_settings("vit_tiny_patch16_224", AVERAGE)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    given = parse_options("patch_size=8,embed_dim=32,depth=2,num_heads=2,global_pool=avg,fc_norm=False")
    assert given == {**SIZES, **AVERAGE}
    assert equal(load_timm("vit_tiny_patch16_224", tmp_path / "vit.safetensors", None, given).model, vit)


def hub_folder(folder, vit, **changes):
    """A folder as timm's push_to_hf_hub writes it."""
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "num_features": 32,
        "global_pool": "avg",
        "model_args": {**SIZES, "fc_norm": False, "img_size": 32},
        "label_names": list("abcde"),
        "pretrained_cfg": {
            "tag": "mine", "input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25],
            "crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "center", "first_conv": "patch_embed.proj",
        },
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(vit.state_dict(), folder / "model.safetensors")
    return folder


def test_a_folder_of_timm_s_hub_needs_no_other_option(tmp_path):
    vit = _with_settings("vit_tiny_patch16_224", AVERAGE)
    folder = hub_folder(tmp_path / "hub", vit)
    loaded = load_timm("", folder)
    assert equal(loaded.model, vit) and loaded.classes == tuple("abcde")
    found = loaded.preprocessing
    assert (found.mean, found.std, found.resize, found.interpolation) == ((0.5,) * 3, (0.25,) * 3, 32, "bilinear")
    assert equal(load_timm("vit_tiny_patch16_224", folder).model, vit)
    with pytest.raises(UserError, match="deit_tiny_patch16_224"):
        load_timm("deit_tiny_patch16_224", folder)


def test_shards_are_read_as_one_file(tmp_path):
    vit = _with_settings("vit_tiny_patch16_224", AVERAGE)
    folder, state = hub_folder(tmp_path / "hub", vit), vit.state_dict()
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{place % 3}.safetensors" for place, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    loaded = load_timm("", folder)
    names = [path.rpartition("/")[2] for path in loaded.digests()]
    assert equal(loaded.model, vit) and names[1:] == ["config.json", *sorted(set(files.values()))]
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="model-1"):
        load_timm("", folder)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architecture": None}, "architecture"),
        ({"architecture": "vit_tny"}, "vit_tny"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"model_args": {"pretrained": True}}, "pretrained"),
        ({"model_args": {"depth": "two"}}, "vit_tiny_patch16_224"),
        ({"model_args": {"num_heads": 0}}, "vit_tiny_patch16_224"),
        ({"model_args": {**SIZES, "depth": 10**9}}, "depth"),
        ({"model_args": {**SIZES, "embed_dim": 1 << 20}}, "less than half"),
        ({"model_args": ["depth"]}, "model_args"),
        ({"pretrained_cfg": {"mean": "half"}}, "mean"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(changes, word, tmp_path):
    folder = hub_folder(tmp_path / "hub", _with_settings("vit_tiny_patch16_224", AVERAGE), **changes)
    with pytest.raises(UserError, match=word) as caught:
        load_timm("", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["global_pool", "checkpoint_path=x.pth", "pretrained=true", "img_size=96"])
def test_options_that_read_files_or_download_or_that_weights_decide_are_refused(text):
    with pytest.raises(UserError):
        parse_options(text)


def test_preprocessing_is_replaced_by_options(tmp_path, image_folder):
    _, path = saved(tmp_path, NAME, num_classes=3)
    source = SourceOptions(path, f"timm:{NAME}", data=str(image_folder))
    usual = open_inputs(source).preprocessing
    changed = replace(source, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0), crop_pct=0.8, interpolation="bilinear")
    found = open_inputs(changed).preprocessing
    assert found == replace(usual, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0), resize=40, interpolation="bilinear")
    with pytest.raises(UserError, match="mean"):
        open_inputs(replace(source, mean=(0.1, 0.2)))
    with pytest.raises(UserError, match="model-args"):
        open_inputs(replace(source, model=None, model_args="depth=2"))


@pytest.mark.parametrize(("names", "fits"), [("abc", True), ("xyz", True), ("acb", False)])
def test_names_of_classes_are_compared_with_the_data_s_if_they_are_of_one_kind(names, fits, tmp_path, image_folder):
    for split in ("train", "val"):
        for old, new in zip(sorted((image_folder / split).iterdir()), "abc", strict=True):
            old.rename(old.with_name(new))
    vit = timm.create_model(NAME, num_classes=3, img_size=32)
    folder = hub_folder(tmp_path / "hub", vit, architecture=NAME, model_args={}, label_names=list(names))
    source = SourceOptions(folder, data=str(image_folder))
    if fits:
        assert open_inputs(source).classes == tuple("abc")
    else:
        with pytest.raises(UserError, match="'c'"):
            open_inputs(source)


@pytest.mark.parametrize("name", [NAME, "small_vit_registers", "small_dinov3", "small_eva02"])
@pytest.mark.parametrize("asked", [None, (32, 64)])
def test_images_that_are_not_square(name, asked, tmp_path):
    """At the size of the file, which its folder or its training command says, and at another."""
    vit, path = saved(tmp_path, name, img_size=(48, 32))
    config = {"architecture": name, "pretrained_cfg": {"input_size": [3, 48, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path.rename(tmp_path / "model.safetensors")
    loaded, size = load_timm("", tmp_path, asked), asked or (48, 32)
    assert loaded.model.config.size == loaded.preprocessing.size == size
    if asked:
        theirs = timm.create_model(name, num_classes=5, img_size=asked).eval()
        state = vit.state_dict()
        if "pos_embed" in state:
            prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [4, 8], [6, 4], prefix)
        theirs.load_state_dict(state)
        vit = theirs
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert (loaded.model(images) - vit(images)).abs().max() < 1e-4


def test_a_table_that_is_not_square_needs_its_size(tmp_path):
    vit, path = saved(tmp_path, NAME, img_size=(48, 16))
    with pytest.raises(UserError, match="position table"):
        load_timm(NAME, path)
    images = torch.randn(2, 3, 48, 16)
    with torch.no_grad():
        assert (load_timm(NAME, path, (48, 16)).model(images) - vit(images)).abs().max() < 1e-4


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("picture", [(100, 60), (60, 100), (50, 50)])
def test_a_crop_that_is_not_square_is_timms(crop_pct, picture):
    """Whichever side of the picture is too long for the shape of the input."""
    size, pixels = (64, 48), np.random.default_rng(0).integers(0, 256, (*picture, 3), dtype=np.uint8)
    stated = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": crop_pct, "interpolation": "bilinear"}
    theirs = create_transform((3, *size), **stated, crop_mode="center")
    ours = timm_preprocessing(network(), size, 3, {**stated, "crop_mode": "center"})
    expected = theirs(Image.fromarray(pixels))
    torch.testing.assert_close(ours.transform()(Image.fromarray(pixels)), expected, rtol=0, atol=1e-6)
    tensor = ours.transform()(torch.from_numpy(pixels).permute(2, 0, 1))
    assert (tensor - expected).abs().max() < 4 / 255 / 0.5  # PyTorch's own resize
