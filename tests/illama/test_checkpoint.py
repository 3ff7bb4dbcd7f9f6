"""Loading weights from bundles and files, and rejecting wrong ones."""

import argparse
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from released_files import RELEASED, released_state, save_released
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import SMALL, write_bundle
from timm.layers import resample_abs_pos_embed

from illama import ILLaMA, ModelConfig
from illama.atomic_write import write_folder
from illama.bundle import SHIPPED
from illama.checkpoints.load import initialize_from, load_checkpoint, resize_positions, write_weights
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import Manifest
from illama.options import SourceOptions
from quant.inputs import open_inputs


def test_a_bundle_gives_its_config_preprocessing_and_classes(small_bundle):
    checkpoint = load_checkpoint(small_bundle)
    assert checkpoint.model.config == SMALL
    assert checkpoint.preprocessing.size == (32, 32)
    assert checkpoint.classes == ("class0", "class1", "class2")
    assert not checkpoint.model.training
    by_file = load_checkpoint(small_bundle / "model.safetensors")
    assert by_file.model.config == SMALL


def test_the_config_of_a_released_file_is_inferred_from_the_shapes(wide_parity, tmp_path):
    arguments = argparse.Namespace(lr=4e-3, model="illama_tiny")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    content = {"model": wide_parity.state, "optimizer": optimizer, "epoch": 3, "args": arguments}
    torch.save(content, tmp_path / "released.pth")
    checkpoint = load_checkpoint(tmp_path / "released.pth")
    assert checkpoint.model.config == wide_parity.config
    with torch.no_grad():
        error = checkpoint.model(wide_parity.input) - wide_parity.tensors["logits.alpha_0.0"]
    assert error.abs().max() < 1e-5


def test_the_shipped_checkpoints_load():
    assert load_checkpoint(SHIPPED).model.config == ModelConfig.preset("nano")
    tiny = load_checkpoint(SHIPPED.parent / "tiny-emoji").model
    assert tiny.config == ModelConfig.preset("tiny", image_size=32, patch_size=4, num_classes=9)
    assert tiny.head.weight.dtype == torch.float32


def test_another_config_is_rejected_with_the_difference(small_bundle):
    asked = ModelConfig(**{**SMALL.to_dict(), "mask": "pre_softmax"})
    with pytest.raises(UserError, match="mask post_softmax, not pre_softmax"):
        load_checkpoint(small_bundle, asked)


@pytest.mark.parametrize(("name", "width", "heads", "hidden", "image_size"), RELEASED, ids=[r[0] for r in RELEASED])
def test_released_files_load_by_path(tmp_path, name, width, heads, hidden, image_size):
    """Published widths, heads, resolutions and classes; only one block, for speed."""
    state = released_state(width, hidden, image_size)
    checkpoint = load_checkpoint(save_released(tmp_path / name, state))
    expected = ModelConfig(image_size=image_size, width=width, depth=1, heads=heads, num_classes=1000)
    assert checkpoint.model.config == expected
    loaded = checkpoint.model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert checkpoint.preprocessing is None and checkpoint.classes == ()


def test_a_whole_tiny_loads_and_runs_at_384(tmp_path):
    path = save_released(tmp_path / RELEASED[0][0], released_state(192, 512, 224, depth=12))
    checkpoint = load_checkpoint(path)
    assert checkpoint.model.config == ModelConfig.preset("tiny")
    assert sum(p.numel() for p in checkpoint.model.parameters()) == pytest.approx(5.7e6, rel=0.01)
    larger = load_checkpoint(path, image_size=384)
    assert larger.model.config == ModelConfig.preset("tiny", image_size=384)
    assert larger.model.pos_embed.shape == (1, 577, 192)
    with torch.no_grad():
        assert larger.model(torch.randn(1, 3, 384, 384)).isfinite().all()


@pytest.mark.parametrize("classes", [10, 21841])
def test_the_number_of_classes_is_read_from_the_file(tmp_path, classes):
    state = released_state(64, 256, 32, classes=classes)
    assert load_checkpoint(save_released(tmp_path / "x.pth", state)).model.config.num_classes == classes


@pytest.mark.parametrize(
    ("change", "identifier"),
    [
        ({"mask": "pre_softmax"}, "mask post_softmax, not pre_softmax"),
        ({"mask": "bidirectional"}, "mask post_softmax, not bidirectional"),
        ({"class_token": "first"}, "class_token last, not first"),
        ({"position": "learnable"}, "position both, not learnable"),
        ({"class_sees_all": True}, "class_sees_all False, not True"),
        ({"image_size": 64}, "pos_embed has shape"),
        ({"norm": "layer"}, "norm1.bias is missing"),
    ],
)
def test_a_released_file_is_not_loaded_with_a_wrong_config(tmp_path, change, identifier):
    path = save_released(tmp_path / RELEASED[0][0], released_state(64, 256, 32))
    config = load_checkpoint(path).model.config
    assert load_checkpoint(path, config).model.config == config
    assert load_checkpoint(path, replace(config, heads=2)).model.config.heads == 2
    with pytest.raises(UserError, match=identifier) as caught:
        load_checkpoint(path, replace(config, **change))
    assert "\n" not in str(caught.value)


def _without_table(state):
    del state["pos_embed"]


def _with_rows(rows):
    def change(state):
        state["pos_embed"] = torch.zeros(1, rows, 64)

    return change


def _flat_table(state):
    state["pos_embed"] = state["pos_embed"][0]


def _integers(state):
    state["norm.weight"] = torch.ones(64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "identifier"),
    [
        (_without_table, "pos_embed"),
        (_with_rows(196), r"shape \(1, 196, 64\).*side \* side \+ 1"),
        (_with_rows(198), "side"),
        (_with_rows(1), "side"),
        (_flat_table, r"shape \(5, 64\)"),
        (_integers, "int8 values in norm.weight"),
    ],
)
def test_wrong_position_tables_and_dtypes_are_rejected(tmp_path, change, identifier):
    state = released_state(64, 256, 32)
    change(state)
    with pytest.raises(UserError, match=identifier):
        load_checkpoint(save_released(tmp_path / "x.pth", state))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_base_patch32_clip_224"])
def test_the_error_for_a_timm_vit_names_to_causal(tmp_path, name, suffix):
    state = timm.create_model(name, depth=1, num_classes=2).state_dict()
    path = tmp_path / f"vit{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(UserError, match=r"to_causal"):
        load_checkpoint(path)


def test_the_state_of_a_training_run_is_rejected(tmp_path):
    content = {"step": 3, "model": ILLaMA(SMALL).state_dict(), "average": {}, "optimizer": {}}
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt .*bundle"):
        load_checkpoint(tmp_path / "checkpoint.pt")


VARIANT = replace(SMALL, mask="pre_softmax", class_token="first", position="learnable", heads=4, norm="layer")


@pytest.mark.parametrize("config", [SMALL, VARIANT, replace(SMALL, position="rope"), replace(SMALL, mlp="gelu")])
def test_weights_contain_their_config(tmp_path, config):
    state = ILLaMA(config).state_dict()
    write_weights(state, config, tmp_path / "weights.safetensors")
    checkpoint = load_checkpoint(tmp_path / "weights.safetensors")
    assert checkpoint.model.config == config
    assert all(torch.equal(value, state[name]) for name, value in checkpoint.model.state_dict().items())
    with pytest.raises(UserError, match="depth 2, not 3"):
        load_checkpoint(tmp_path / "weights.safetensors", replace(config, depth=3))
    write_weights(state, config, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "weights.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "weights.safetensors"]


def test_write_weights_writes_json_metadata(tmp_path):
    state = {name: value.T if value.ndim == 2 else value for name, value in ILLaMA(SMALL).state_dict().items()}
    write_weights(state, SMALL, tmp_path / "weights.safetensors")  # transposed, so not contiguous
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["illama_config"]) == SMALL.to_dict()
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["head.weight"], state["head.weight"])


def test_a_file_without_metadata_uses_the_given_config(tmp_path):
    save_file(ILLaMA(SMALL).state_dict(), tmp_path / "bare.safetensors", {"format": "pt"})
    assert load_checkpoint(tmp_path / "bare.safetensors").model.config == replace(SMALL, heads=1)
    assert load_checkpoint(tmp_path / "bare.safetensors", SMALL).model.config == SMALL
    save_file(ILLaMA(VARIANT).state_dict(), tmp_path / "variant.safetensors")
    assert load_checkpoint(tmp_path / "variant.safetensors", VARIANT).model.config == VARIANT


def test_a_manifest_that_contradicts_the_metadata_is_rejected(small_bundle):
    state = load_file(small_bundle / "model.safetensors")
    write_weights(state, SMALL, small_bundle / "model.safetensors")
    assert load_checkpoint(small_bundle).model.config == SMALL
    write_weights(state, replace(SMALL, mask="pre_softmax"), small_bundle / "model.safetensors")
    for path in (small_bundle, small_bundle / "model.safetensors"):
        with pytest.raises(UserError, match="mask pre_softmax, not post_softmax"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("{", "x.safetensors"),
        ("[1]", "x.safetensors"),
        ('{"wings": 2}', "wings"),
        ('{"depth": "2"}', "x.safetensors .*depth"),
        ('{"depth": 2147483648}', "depth"),
        ('{"depth": 1024}', "depth 1024"),
        ("3", "x.safetensors"),
    ],
)
def test_damaged_metadata_is_rejected(tmp_path, text, identifier):
    save_file(ILLaMA(SMALL).state_dict(), tmp_path / "x.safetensors", {"illama_config": text})
    with pytest.raises(UserError, match=identifier):
        load_checkpoint(tmp_path / "x.safetensors")


def _table(side, width=3, seed=0):
    return torch.randn(1, side * side + 1, width, generator=torch.Generator().manual_seed(seed))


SIDES = st.integers(1, 20)


@settings(deadline=None, max_examples=60)
@given(old=SIDES, new=SIDES, seed=st.integers(0, 2**32 - 1), class_token=st.sampled_from(["last", "first"]))
def test_resizing_keeps_the_class_row_and_agrees_with_timm(old, new, seed, class_token):
    """timm has the class row first; antialiasing is off, as in DeiT and the released code."""
    table = _table(old, seed=seed)
    at_end = table if class_token == "last" else table.roll(-1, dims=1)
    resized = resize_positions(table, new, class_token)
    assert resized.shape == (1, new * new + 1, 3)
    row = -1 if class_token == "last" else 0
    assert torch.equal(resized[:, row], table[:, row])
    expected = resample_abs_pos_embed(at_end.roll(1, dims=1), [new, new], antialias=False, align_corners=False)
    expected = expected.roll(-1, dims=1) if class_token == "last" else expected
    assert torch.equal(resized, expected)
    if old == new:
        assert torch.equal(resized, table)


def _keys_matrix(old, new):
    """Returns the matrix (new, old) of a cubic convolution (Keys 1981, a = -0.75) with repeated edges."""
    a, matrix = -0.75, np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            x = abs(center - j)
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[i, min(max(j, 0), old - 1)] += weight
    return matrix


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (7, 14), (14, 7), (4, 5), (3, 1), (1, 4)])
def test_resizing_equals_a_cubic_convolution(old, new):
    table, matrix = _table(old), _keys_matrix(old, new)
    grid = table[0, :-1].double().numpy().reshape(old, old, 3)
    expected = np.einsum("ai,bj,ijc->abc", matrix, matrix, grid).reshape(-1, 3)
    resized = resize_positions(table, new)[0, :-1].numpy()
    assert np.abs(resized - expected).max() < 2e-5


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (7, 32), (16, 8)])
def test_resizing_keeps_constants_and_ramps(old, new):
    """A cubic with a = -0.75 changes a ramp by up to 0.0481 of a step, s^3 - 1.5 s^2 + 0.5 s, and not at all at 2:1."""
    constant = torch.full((1, old * old + 1, 2), 0.3)
    assert (resize_positions(constant, new) - 0.3).abs().max() < 1e-6
    steps = torch.arange(old, dtype=torch.float32)
    ramp = torch.stack([steps.expand(old, old), steps[:, None].expand(old, old)], dim=-1).reshape(1, -1, 2)
    resized = resize_positions(torch.cat([ramp, torch.zeros(1, 1, 2)], dim=1), new)[0, :-1].view(new, new, 2)
    centers = (torch.arange(new) + 0.5) * old / new - 0.5
    inside = (centers >= 1) & (centers <= old - 2)
    across, down = resized[:, inside, 0] - centers[inside], resized[inside, :, 1] - centers[inside, None]
    bound = 1e-5 if old == 2 * new else 0.0482
    assert across.abs().max() < bound and down.abs().max() < bound


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, class_token="first"), replace(SMALL, position="rope")])
def test_another_resolution_changes_only_the_positions(tmp_path, config):
    bundle = write_bundle(tmp_path / "bundle", config)
    state = load_file(bundle / "model.safetensors")
    for image_size in (16, 32, 64):
        checkpoint = load_checkpoint(bundle, image_size=image_size)
        assert checkpoint.model.config == replace(config, image_size=image_size)
        assert checkpoint.preprocessing.size == (image_size, image_size)
        loaded = checkpoint.model.state_dict()
        same = {name for name in state if torch.equal(state[name], loaded[name])}
        assert same == state.keys() - ({"pos_embed"} if image_size != 32 else set())
        if "pos_embed" in state:
            row = -1 if config.class_token == "last" else 0
            assert torch.equal(loaded["pos_embed"][:, row], state["pos_embed"][:, row])
        with torch.no_grad():
            assert checkpoint.model(torch.randn(1, 3, image_size, image_size)).isfinite().all()
    for wrong, identifier in ((30, "not a multiple of patch_size 8"), (0, "image_size")):
        with pytest.raises(UserError, match=identifier):
            load_checkpoint(bundle, image_size=wrong)


MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("stored", "image_size", "resize"),
    [
        (Preprocessing.imagenet(224), 288, 329),
        (Preprocessing.imagenet(224), 384, None),
        (Preprocessing.imagenet(384), 224, 256),
        (Preprocessing((224, 224), 3, MEAN, STD, 248), 192, 212),
        (Preprocessing((224, 224), 3, MEAN, STD, 248), 384, None),
        (Preprocessing((224, 224), 3, MEAN, STD), 288, None),
        (Preprocessing((384, 384), 3, MEAN, STD), 224, None),
    ],
)
def test_the_preprocessing_is_adapted_to_the_resolution(tmp_path, stored, image_size, resize):
    config = ModelConfig(image_size=stored.size[0], patch_size=32, width=64, depth=1, heads=1, num_classes=2)
    state = ILLaMA(config).state_dict()
    with write_folder(tmp_path / "bundle") as draft:
        Manifest("illama", config.to_dict(), stored, ("a", "b")).write(draft)
        write_weights(state, config, draft / "model.safetensors")
    assert load_checkpoint(tmp_path / "bundle", image_size=stored.size[0]).preprocessing == stored
    resized = load_checkpoint(tmp_path / "bundle", image_size=image_size).preprocessing
    assert resized == replace(stored, size=(image_size, image_size), resize=resize)


def test_the_shipped_checkpoint_works_at_other_resolutions(real_images):
    """It would not if rows and columns were exchanged or the class row misplaced."""
    images, labels = (torch.from_numpy(array) for array in real_images)
    for image_size, at_least in ((28, 90), (24, 80), (32, 80)):
        resized = torch.nn.functional.interpolate(images, size=(image_size, image_size), mode="bicubic")
        with torch.no_grad():
            right = load_checkpoint(SHIPPED, image_size=image_size).model(resized).argmax(1) == labels
        assert 100 * right.float().mean() > at_least


@pytest.mark.parametrize("new_head", [False, True])
def test_fine_tuning_starts_from_the_weights(small_bundle, new_head):
    state = load_file(small_bundle / "model.safetensors")
    torch.manual_seed(1)
    model = ILLaMA(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    left = initialize_from(model, small_bundle, new_head=new_head)
    assert left == (["head.weight", "head.bias"] if new_head else [])
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name in left else state)[name])


def test_fine_tuning_takes_another_resolution_and_other_classes(tmp_path):
    state = released_state(64, 256, 32)
    path = save_released(tmp_path / RELEASED[0][0], state)
    model = ILLaMA(ModelConfig(image_size=64, width=64, depth=1, heads=1, num_classes=7))
    with pytest.raises(UserError, match=r"num_classes 1000, not 7.*--new-head"):
        initialize_from(model, path, new_head=False)
    assert initialize_from(model, path, new_head=True) == ["head.weight", "head.bias"]
    assert torch.equal(model.pos_embed.data, resize_positions(state["pos_embed"], 4))
    assert torch.equal(model.blocks[0].mlp.fc3.weight.data, state["blocks.0.mlp.fc3.weight"])


@pytest.mark.parametrize(("given_channels", "channels"), [(1, 3), (3, 1)])
def test_a_gray_image_gives_the_same_result_in_one_channel_and_in_three(tmp_path, given_channels, channels):
    bundle = write_bundle(tmp_path / "bundle", replace(SMALL, in_channels=given_channels))
    model = ILLaMA(replace(SMALL, in_channels=channels)).eval()
    initialize_from(model, bundle, new_head=False)
    gray = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = load_checkpoint(bundle).model(gray.expand(-1, given_channels, -1, -1))
        assert (model(gray.expand(-1, channels, -1, -1)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "identifier"),
    [
        ({"mask": "pre_softmax"}, "mask post_softmax, not pre_softmax"),
        ({"depth": 3}, "depth 2, not 3"),
        ({"width": 128}, "width 64, not 128"),
        ({"heads": 4}, "heads 2, not 4"),
        ({"patch_size": 16}, "patch_size 8"),
        ({"position": "rope"}, "position both, not rope"),
        ({"in_channels": 2}, "3 color channels, not 2"),
        ({"norm": "layer"}, "norm rms, not layer"),
        ({"class_token": "first"}, "class_token last, not first"),
    ],
)
def test_fine_tuning_another_network_is_rejected(small_bundle, change, identifier):
    with pytest.raises(UserError, match=identifier):
        initialize_from(ILLaMA(replace(SMALL, **change)), small_bundle, new_head=True)


def test_ptq_takes_an_image_size(small_bundle, image_folder, tmp_path):
    options = SourceOptions(checkpoint=small_bundle, data=str(image_folder))
    inputs = open_inputs(replace(options, image_size=64))
    assert inputs.model.config == replace(SMALL, image_size=64)
    assert inputs.preprocessing.size == (64, 64)
    with pytest.raises(UserError, match=r"60.*patch_size 8"):
        open_inputs(replace(options, image_size=60))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path):
    trap = tmp_path / "executed"
    torch.save({"model": Payload(trap)}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="more than tensors"):
        load_checkpoint(tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "plain.pth")
    assert not trap.exists()


def _break(state, kind):
    if kind == "nan":
        state["norm.weight"][3] = float("nan")
    elif kind == "shape":
        state["head.weight"] = state["head.weight"][:2].clone()
    elif kind == "missing":
        del state["norm.weight"]
    elif kind == "unknown":
        state["extra"] = torch.zeros(1)
    return state


@pytest.mark.parametrize(
    ("kind", "identifier"),
    [
        ("nan", "NaN .*norm.weight"),
        ("shape", "head.weight has shape"),
        ("missing", "norm.weight is missing"),
        ("unknown", "extra is unknown"),
    ],
)
def test_wrong_weights_are_rejected(small_bundle, kind, identifier):
    path = small_bundle / "model.safetensors"
    save_file(_break(load_file(path), kind), path)
    with pytest.raises(UserError, match=identifier):
        load_checkpoint(small_bundle)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_a_truncated_file_is_rejected(tmp_path, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    state = ILLaMA(SMALL).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=path.name):
        load_checkpoint(path)


@pytest.mark.parametrize("state", [{"weight": torch.zeros(2)}, {"model": {"blocks.0.x": torch.zeros(1)}}])
def test_another_network_s_weights_are_rejected(tmp_path, state):
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        load_checkpoint(tmp_path / "other.pth")


def test_a_missing_file_or_manifest_is_named(tmp_path, small_bundle):
    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    (small_bundle / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(small_bundle)
    (small_bundle / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a bundle"):
        load_checkpoint(small_bundle)
