"""Conversion of a released file to a bundle."""

import pytest
import torch
from released_files import RELEASED, released_state, save_released
from safetensors.torch import load_file
from support import assert_one_line_error, run_command
from timm.data import ImageNetInfo

from illama.bundle import sha256
from illama.checkpoints.conversion import to_half
from illama.checkpoints.load import load_checkpoint, resize_positions
from illama.convert import ConvertOptions, main
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import Manifest


@pytest.fixture
def released(tmp_path):
    return save_released(tmp_path / RELEASED[0][0], released_state(192, 512, 224))


@pytest.fixture
def ten_classes(tmp_path):
    return save_released(tmp_path / "ten.pth", released_state(64, 256, 32, classes=10))


def test_the_command_writes_a_bundle(released, tmp_path):
    out = tmp_path / "runs" / "illama-tiny"
    result = run_command("illama/convert.py", released, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "192 wide, 1 blocks, 3 heads, 224 pixels, 1000 classes" in result.stdout
    manifest = Manifest.read(out)
    assert manifest.provenance.inputs == {str(released): sha256(released)}
    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert manifest.preprocessing == Preprocessing((224, 224), 3, means, deviations, 256)
    assert "illama/convert.py" in manifest.provenance.command and "torch" in manifest.provenance.versions
    assert manifest.classes[:2] == ("n01440764", "n01443537") and len(set(manifest.classes)) == 1000
    original, bundle = load_checkpoint(released), load_checkpoint(out)
    assert bundle.model.config == original.model.config
    assert bundle.preprocessing == Preprocessing.imagenet(224)
    state = original.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in bundle.model.state_dict().items())
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "model.safetensors"]


def test_an_error_is_one_line_and_leaves_no_files(ten_classes, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    result = run_command("illama/convert.py", ten_classes, "--out", tmp_path / "out", "--classes", names)
    assert_one_line_error(result, "names.txt names 2 classes", "10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.txt", "ten.pth"]


def test_imagenet_s_names_are_its_sorted_folder_names(released, tmp_path):
    """torchvision's ImageFolder numbers classes by sorted folder names, and so does ImageNet."""
    main(ConvertOptions(released, tmp_path / "out"))
    classes = Manifest.read(tmp_path / "out").classes
    assert list(classes) == sorted(classes)
    assert ImageNetInfo().index_to_description(classes.index("n02123045")).startswith("tabby")


def test_class_names_come_from_the_file_the_bundle_or_are_numbers(ten_classes, tmp_path):
    main(ConvertOptions(ten_classes, tmp_path / "numbers"))
    assert Manifest.read(tmp_path / "numbers").classes == tuple(str(i) for i in range(10))
    names = tmp_path / "names.txt"
    names.write_text("".join(f"klasse ä{i} \n" for i in range(10)), encoding="utf-8")
    main(ConvertOptions(ten_classes, tmp_path / "named", classes=names))
    assert Manifest.read(tmp_path / "named").classes == tuple(f"klasse ä{i}" for i in range(10))
    main(ConvertOptions(tmp_path / "named", tmp_path / "again"))
    assert Manifest.read(tmp_path / "again").classes == tuple(f"klasse ä{i}" for i in range(10))
    with pytest.raises(UserError, match=r"nothing\.txt"):
        main(ConvertOptions(ten_classes, tmp_path / "out", classes=tmp_path / "nothing.txt"))
    names.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"names\.txt"):
        main(ConvertOptions(ten_classes, tmp_path / "out", classes=names))
    assert not (tmp_path / "out").exists()


def test_another_resolution(released, tmp_path):
    main(ConvertOptions(released, tmp_path / "out", image_size=384))
    bundle, original = load_checkpoint(tmp_path / "out"), load_checkpoint(released)
    assert bundle.model.config.image_size == 384
    assert bundle.preprocessing == Preprocessing.imagenet(384) and bundle.preprocessing.resize is None
    assert torch.equal(bundle.model.pos_embed, resize_positions(original.model.pos_embed, 24))
    main(ConvertOptions(tmp_path / "out", tmp_path / "out", image_size=288))  # in place
    assert load_checkpoint(tmp_path / "out").preprocessing == Preprocessing.imagenet(288)


def test_half_halves_the_size_and_is_loaded_as_float32(released, tmp_path):
    main(ConvertOptions(released, tmp_path / "whole"))
    main(ConvertOptions(released, tmp_path / "half", half=True))
    whole, half = (tmp_path / name / "model.safetensors" for name in ("whole", "half"))
    assert half.stat().st_size == pytest.approx(whole.stat().st_size / 2, rel=0.01)
    assert {value.dtype for value in load_file(half).values()} == {torch.float16}
    state = load_checkpoint(released).model.state_dict()
    model = load_checkpoint(tmp_path / "half").model
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].half().float())
    larger = load_checkpoint(tmp_path / "half", image_size=384).model
    assert torch.equal(larger.pos_embed, resize_positions(model.pos_embed, 24))  # interpolated in float32
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).dtype == torch.float32


def test_values_beyond_float16_are_rejected():
    assert to_half({"x": torch.tensor([65504.0])})["x"].item() == 65504
    with pytest.raises(UserError, match=r"x .*float16"):
        to_half({"x": torch.tensor([70000.0])})


def test_another_folder_is_not_replaced(ten_classes, tmp_path):
    with pytest.raises(UserError, match="other files"):
        main(ConvertOptions(ten_classes, tmp_path))
