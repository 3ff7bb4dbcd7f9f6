"""An image, upright and rotated by EXIF, in 8 and 16 bits: every decoding path gives the same result."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import SMALL, assert_one_line_error, write_bundle, write_format_1

from eval.measure.open_bundles import check_alike
from eval.metrics.cue_conflict import Stimuli
from eval.metrics.separation import open_outside
from illama.bundle import CPU_ONNX, MANIFEST, SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.data.ade20k import SegmentationFolder
from illama.data.datasets import open_data
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.inference import predict, torch_infer
from illama.manifest import Manifest
from illama.options import SourceOptions
from illama.training.distributed import Processes
from illama.training.recipe import Recipe, read_recipe
from illama.training.start import start_run
from quant.export.onnx_export import export_onnx
from quant.inputs import open_inputs
from quant.qat import QatOptions

CASES = Path(__file__).parents[1] / "data"
NAMES = ("upright.jpg", "orientation-6.jpg", "grey8.png", "grey16.png")


def in_a_folder(folder):
    for label, name in enumerate(NAMES):
        (folder / "val" / str(label)).mkdir(parents=True)
        shutil.copy(CASES / name, folder / "val" / str(label))
    return str(folder)


def in_a_tar(folder):
    folder.mkdir()
    with tarfile.open(folder / "val-0.tar", "w") as tar:
        for label, name in enumerate(NAMES):
            key, suffix = name.split(".")
            for member, content in ((f"{key}.{suffix}", (CASES / name).read_bytes()), (f"{key}.cls", b"%d" % label)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return f"webdataset:{folder}"


def in_parquet(folder):
    folder.mkdir()
    rows = [{"bytes": (CASES / name).read_bytes(), "path": name} for name in NAMES]
    pq.write_table(pa.table({"image": rows, "label": range(len(NAMES))}), folder / "validation-0.parquet")
    return f"parquet:{folder}"


@pytest.mark.parametrize("pack", [in_a_folder, in_a_tar, in_parquet])
def test_data_sets_give_the_same_logits(pack, tmp_path):
    shipped, spec = load_checkpoint(SHIPPED), pack(tmp_path / "set")
    transform = shipped.preprocessing.transform()
    for exif, same in (("apply", (0, 1, 2, 3)), ("ignore", (0, 2, 3))):
        split = open_data(spec, exif).test()
        logits, labels = predict({"nano": torch_infer(shipped.model)}, split, transform)
        classes = [shipped.classes[index] for index in logits["nano"].argmax(1)]
        assert labels.tolist() == [0, 1, 2, 3]
        assert [classes[index] for index in same] == ["Pullover"] * len(same)
        if exif == "ignore":
            assert classes[1] == "Bag"
        else:
            assert np.abs(logits["nano"] - logits["nano"][0]).max() < 0.02
        assert np.array_equal(logits["nano"][2], logits["nano"][3])  # 16 bits are 8 bits times 257


def test_other_readers_apply_the_orientation(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in NAMES[:2]:
        shutil.copy(CASES / name, tmp_path)
    for index, name in enumerate(NAMES[:2]):
        shutil.copy(CASES / name, tmp_path / "cat" / f"cat{index}-dog1.png")

    def difference(split):
        upright, turned = (np.asarray(split[index][0]).astype(int) for index in (0, 1))
        return np.abs(upright - turned).mean()

    for kind in (Stimuli, lambda folder, *exif: open_outside(str(folder / "cat"), *exif)):
        assert difference(kind(tmp_path)) < 2 and difference(kind(tmp_path, "ignore")) > 20


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "nano"
    folder.mkdir()
    shutil.copy(SHIPPED / MANIFEST, folder)
    export_onnx(load_checkpoint(SHIPPED).model, folder / CPU_ONNX, "plain")
    return folder


def without_fields(bundle, folder):
    """Returns the bundle without the fields, as from an earlier version."""
    shutil.copytree(bundle, folder)
    write_format_1(folder, "exif", "class_order")
    return folder


def test_predictions_of_files_and_of_frames(nano, run_here, tmp_path):
    def answers(bundle):
        result = run_here(
            "deploy/predict.py", *(CASES / name for name in NAMES), "--engine", bundle, "--runtime", "onnxruntime"
        )
        assert result.returncode == 0, result.stderr
        first = [line.split(": ")[1].split("%")[0].split(" ") for line in result.stdout.splitlines()[1:]]
        return [name for name, _ in first], [float(percent) for _, percent in first]

    classes, percents = answers(nano)
    assert classes == ["Pullover"] * 4 and percents == pytest.approx([percents[0]] * 4, abs=0.2)
    assert run_here("deploy/camera.py", nano, "--frame", "112x112", "--out", tmp_path / "camera").returncode == 0
    assert answers(tmp_path / "camera") == (classes, pytest.approx(percents, abs=0.2))
    old = without_fields(nano, tmp_path / "old")
    assert answers(old)[0] == ["Pullover", "Bag", "Pullover", "Pullover"]


def test_an_extreme_frame_is_rejected(nano, run_here, tmp_path):
    for frame in ("1x20000", "20000x1", "9000x9000", "0x5"):
        result = run_here("deploy/camera.py", nano, "--frame", frame, "--out", tmp_path / "camera")
        assert_one_line_error(result, frame, "16384")
    assert_one_line_error(run_here("deploy/camera.py", nano, "--channels", 2), "channels")
    assert not (tmp_path / "camera").exists()
    assert run_here("deploy/camera.py", nano, "--frame", "1x16384", "--out", tmp_path / "camera").returncode == 0


def test_the_manifest_has_exif_and_class_order(nano, tmp_path):
    new, old = Manifest.read(nano).preprocessing, without_fields(nano, tmp_path / "old")
    assert (new.exif, new.class_order) == ("apply", "words")
    before = Manifest.read(old).preprocessing
    assert (before.exif, before.class_order) == ("ignore", "words") and before == replace(new, exif="ignore")
    with pytest.raises(UserError, match="takes other images"):
        check_alike([nano, old])
    ignoring = shutil.copytree(nano, tmp_path / "ignoring")
    manifest = Manifest.read(ignoring)
    other = replace(manifest.preprocessing, exif="ignore", class_order="natural")
    replace(manifest, preprocessing=other).write(ignoring)
    assert check_alike([old, ignoring]).classes == manifest.classes
    values = json.loads((ignoring / MANIFEST).read_text())
    for damage in ({"exif": "yes"}, {"class_order": None}, {"resize": 20}):
        (ignoring / MANIFEST).write_text(json.dumps({**values, "preprocessing": {**values["preprocessing"], **damage}}))
        with pytest.raises(UserError, match=next(iter(damage))):
            Manifest.read(ignoring)


def test_options_override_the_bundle(tmp_path, image_folder, run_here):
    bundle = write_bundle(tmp_path / "bundle", SMALL)
    old, options = without_fields(bundle, tmp_path / "old"), {"data": str(image_folder), "calibration_images": 4}
    for checkpoint, given, expected in (
        (bundle, None, "apply"),
        (old, None, "ignore"),
        (old, "apply", "apply"),
        (bundle, "ignore", "ignore"),
        (bundle / "model.safetensors", None, "apply"),
        (bundle / "model.safetensors", "ignore", "ignore"),
    ):
        inputs = open_inputs(SourceOptions(checkpoint, exif=given, **options))
        assert inputs.preprocessing.exif == inputs.data.exif == expected
    for checkpoint, more, expected in (
        (bundle, (), "apply"),
        (old, (), "ignore"),
        (old, ("--exif", "apply"), "apply"),
        (bundle, ("--exif", "ignore"), "ignore"),
    ):
        result = run_here("illama/convert.py", checkpoint, "--out", tmp_path / "out", *more)
        assert result.returncode == 0, result.stderr
        assert Manifest.read(tmp_path / "out").preprocessing.exif == expected
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("exif: ignore\nclass_order: natural\n")
    read = read_recipe(QatOptions, tmp_path, str(recipe))
    assert (read.exif, read.class_order) == ("ignore", "natural")
    recipe.write_text("exif: [ignore]\n")
    with pytest.raises(UserError, match="exif"):
        read_recipe(QatOptions, tmp_path, str(recipe))


def test_training_stores_its_options_in_the_bundle(tmp_path, image_folder):
    small = {"model": "nano", "image_size": 16, "patch_size": 8, "width": 64, "depth": 1, "heads": 1}
    recipe = Recipe(data=str(image_folder), out=tmp_path / "run", batch_size=2, micro_batch=2, workers=0, **small)
    alone = Processes(0, 1, torch.device("cpu"))
    for given, expected in (
        ({}, ("apply", "words")),
        ({"exif": "ignore", "class_order": "natural"}, ("ignore", "natural")),
    ):
        run = start_run(replace(recipe, **given), alone)
        assert (
            (run.task.preprocessing.exif, run.task.preprocessing.class_order)
            == (run.task.data.exif, run.task.data.class_order)
            == expected
        )


def test_the_resolution_does_not_change_exif(tmp_path):
    config = replace(SMALL, image_size=224, patch_size=32)
    bundle = without_fields(write_bundle(tmp_path / "bundle", config), tmp_path / "old")
    resized = load_checkpoint(bundle, image_size=288).preprocessing
    assert resized == replace(Preprocessing.imagenet(288), exif="ignore")


def test_segmentation_images_are_rotated_and_long_ones_rejected(tmp_path):
    for part in ("images/validation", "annotations/validation"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "objectInfo2.txt").write_text("Idx\tName\n1\tone\n2\ttwo\n")
    for name, width in (("turned", 40), ("strip", 24 * 32 + 1)):
        exif = Image.Exif()
        exif[274] = 6
        Image.new("RGB", (24, width) if name == "turned" else (width, 24)).save(
            tmp_path / f"images/validation/{name}.jpg", **({"exif": exif} if name == "turned" else {})
        )
        Image.new("L", (width, 24), 1).save(tmp_path / f"annotations/validation/{name}.png")
    strip, turned = 0, 1
    image, labels = SegmentationFolder(tmp_path).test()[turned]
    assert image.shape[-2:] == labels.shape == (24, 40)
    with pytest.raises(UserError, match=r"turned\.png has 40 x 24"):
        SegmentationFolder(tmp_path, "ignore").test()[turned]
    with pytest.raises(UserError, match=r"strip\.jpg .*32"):
        SegmentationFolder(tmp_path).test()[strip]
    assert SegmentationFolder(tmp_path, "ignore").preprocessing(512, 3).exif == "ignore"
