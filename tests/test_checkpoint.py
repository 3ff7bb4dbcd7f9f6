"""Weights in: bundles, bare files, and everything that can be wrong with them."""

import argparse
import os
import pickle

import pytest
import torch
from conftest import SMALL, write_bundle
from safetensors.torch import load_file, save_file

from illama import ILLaMA, ModelConfig
from illama.bundle import Manifest, write_file, write_folder
from illama.checkpoint import SHIPPED, load_checkpoint
from illama.errors import UserError


def test_a_bundle_gives_its_config_preprocessing_and_classes(small_bundle):
    checkpoint = load_checkpoint(small_bundle)
    assert checkpoint.model.config == SMALL
    assert checkpoint.preprocessing.image_size == 32
    assert checkpoint.classes == ("class0", "class1", "class2")
    assert not checkpoint.model.training
    by_file = load_checkpoint(small_bundle / "model.safetensors")
    assert by_file.model.config == SMALL


def test_a_released_file_loads_with_its_config_read_off_the_shapes(wide_parity, tmp_path):
    arguments = argparse.Namespace(lr=4e-3, model="illama_tiny")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    content = {"model": wide_parity.state, "optimizer": optimizer, "epoch": 3, "args": arguments}
    torch.save(content, tmp_path / "released.pth")
    checkpoint = load_checkpoint(tmp_path / "released.pth")
    assert checkpoint.model.config == wide_parity.config
    with torch.no_grad():
        error = checkpoint.model(wide_parity.input) - wide_parity.tensors["logits.alpha_0.0"]
    assert error.abs().max() < 1e-5


def test_the_shipped_checkpoint_loads():
    assert load_checkpoint(SHIPPED).model.config == ModelConfig.preset("nano")


def test_another_config_is_refused_with_the_difference(small_bundle):
    asked = ModelConfig.from_dict({**SMALL.to_dict(), "mask": "pre_softmax"})
    with pytest.raises(UserError, match="mask post_softmax, not pre_softmax"):
        load_checkpoint(small_bundle, asked)


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
    ("kind", "words"),
    [("nan", "NaN or infinite values in norm.weight"), ("shape", "head.weight has shape"),
     ("missing", "norm.weight is missing"), ("unknown", "extra is unknown")],
)  # fmt: skip
def test_wrong_weights_are_refused(small_bundle, kind, words):
    path = small_bundle / "model.safetensors"
    save_file(_break(load_file(path), kind), path)
    with pytest.raises(UserError, match=words):
        load_checkpoint(small_bundle)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 10, 5000])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    state = ILLaMA(SMALL).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"truncated|more than tensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("state", [{"weight": torch.zeros(2)}, {"model": {"blocks.0.x": torch.zeros(1)}}])
def test_another_network_s_weights_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not an iLLaMA checkpoint"):
        load_checkpoint(tmp_path / "other.pth")


def test_a_missing_file_or_manifest_is_named(tmp_path, small_bundle):
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    (small_bundle / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(small_bundle)
    (small_bundle / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a bundle"):
        load_checkpoint(small_bundle)


def test_a_failed_write_leaves_the_old_bundle(tmp_path):
    folder = write_bundle(tmp_path / "bundle", SMALL)
    before = Manifest.read(folder)
    with pytest.raises(RuntimeError), write_folder(folder) as draft:
        (draft / "manifest.json").write_text("half")
        raise RuntimeError("killed")
    assert Manifest.read(folder) == before
    with pytest.raises(RuntimeError), write_file(folder / "manifest.json") as draft:
        draft.write_text("half")
        raise RuntimeError("killed")
    assert Manifest.read(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_killed_processes_left_is_swept(tmp_path):
    (tmp_path / ".bundle.draft-999999999").mkdir()
    write_bundle(tmp_path / "bundle", SMALL)
    (tmp_path / "bundle").rename(tmp_path / ".bundle.old-999999999")  # killed between the two renames
    with pytest.raises(RuntimeError), write_folder(tmp_path / "bundle"):
        raise RuntimeError("killed")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert load_checkpoint(tmp_path / "bundle").model.config == SMALL


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="other files"), write_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "precious"
