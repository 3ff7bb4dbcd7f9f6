"""Segmentation: network, data, scores, training and exported files, compared with independent references."""

import runpy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from support import ROOT, SMALL, assert_one_line_error, run_command
from timm_networks import randomise
from torch import nn

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from deploy.trt.build_bundle import build_bundle
from deploy.trt.library import find_library
from deploy.trt.record import EngineRecord
from eval.metrics.miou import miou_drop
from eval.segmentation import SegmentationEvalOptions
from eval.segmentation import main as evaluate
from illama import ILLaMA, ModelConfig
from illama.bundle import CPU_ONNX, FUSED_ONNX
from illama.checkpoints.load import initialize_from, write_weights
from illama.data.ade20k import IGNORED, AugmentedMaps, SegmentationFolder
from illama.data.preprocessing import Preprocessing
from illama.errors import UserError
from illama.manifest import TRAINED, Manifest
from illama.models.attention import MaskedNetwork
from illama.models.timm_vit import to_quantizable
from illama.models.upernet import (
    AdaptiveAvgPool,
    SegmentationConfig,
    TimmSegmentationConfig,
    TimmUperNet,
    TransposedConv,
    UperNet,
    fold_batch_norms,
    load_segmentation,
)
from illama.options import check_bounds
from illama.segmentation_scores import Scores, Views, count_pixels, predict_map, window_starts
from illama.train_segmentation import main as train
from illama.training.distributed import Processes
from illama.training.segmentation_options import SegmentationOptions
from illama.training.segmentation_run import map_loss, start_segmentation
from illama.training.trainer import fit, parameter_groups
from quant.export.onnx_export import export_onnx
from quant.ptq_segmentation import PtqSegmentationOptions
from quant.ptq_segmentation import main as quantize
from quant.quantizers.calibrate import calibrate
from quant.schemes.scheme import resolve, shipped_scheme, write_scheme

SHAPES = runpy.run_path(str(ROOT / "benchmarks" / "draw_shapes.py"))
SHAPE = {"image_size": 64, "patch_size": 16, "width": 64, "depth": 4, "heads": 2, "decoder_channels": 32}
TINY = SegmentationConfig(**SHAPE, num_classes=4)
TRAINING = SegmentationOptions(
    **SHAPE, epochs=7, batch_size=8, micro_batch=8, learning_rate=3e-3, warmup_epochs=1, workers=0, autocast="float32"
)
PLAIN = Preprocessing((8, 8), 3, (0.0,) * 3, (1 / 255,) * 3, 8)  # a pixel's value is the network's input


def _draw(folder, **options):
    folder.mkdir(parents=True)
    SHAPES["write_shapes"](folder, SHAPES["DrawOptions"](folder, **options))
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return _draw(tmp_path_factory.mktemp("data") / "shapes", train=64, validation=10, coloured=1.0)


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train(replace(TRAINING, data=str(shapes), out=out))
    return out / "bundle"


@pytest.fixture
def network():
    torch.manual_seed(0)
    return UperNet(TINY).eval()


def test_the_linear_equals_a_transposed_convolution():
    torch.manual_seed(0)
    doubled, reference = TransposedConv(6), nn.ConvTranspose2d(6, 6, 2, 2)
    reference.weight.data = doubled.linear.weight.data.unflatten(0, (2, 2, 6)).permute(3, 2, 0, 1)
    reference.bias.data.zero_()
    doubled.linear.bias.data.zero_()
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(doubled(x).permute(0, 3, 1, 2), reference(x.permute(0, 3, 1, 2)))


@pytest.mark.parametrize(("side", "bins"), [(4, 6), (16, 3), (16, 6), (7, 2)])
def test_pooling_equals_adaptive_average_pooling(side, bins):
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(AdaptiveAvgPool(side, bins)(x), nn.functional.adaptive_avg_pool2d(x, bins))


def test_the_pyramid_has_the_outputs_of_four_blocks_at_four_sizes(network):
    outputs = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    maps = network.pyramid(torch.randn(2, 3, 64, 64))
    assert [tuple(each.shape) for each in maps] == [(2, 64, side, side) for side in (16, 8, 4, 2)]
    third = network.norm(outputs[2][:, :16]).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(maps[2], third)
    assert network.taps == (0, 1, 2, 3)
    with torch.device("meta"):
        assert UperNet(SegmentationConfig.preset("base")).taps == (2, 5, 8, 11)
        assert UperNet(SegmentationConfig.preset("large")).taps == (5, 11, 17, 23)


TIMM = {"depth": 4, "embed_dim": 64, "num_heads": 2, "patch_size": 16}


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2",
     "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224", "vit_small_patch16_dinov3",
     "vit_medium_patch16_reg4_gap_256"],
)  # fmt: skip
def test_the_maps_of_timms_networks_are_timms(name):
    config = TimmSegmentationConfig(name, 64, 3, 5, options=TIMM, decoder_channels=8)
    vit, network, images = randomise(config.create()), TimmUperNet(config).eval(), torch.randn(2, 3, 64, 64)
    network.load_state_dict(to_quantizable(vit).state_dict(), strict=False)
    with torch.no_grad():
        theirs = vit.forward_intermediates(images, 4, norm=True, output_fmt="NLC", intermediates_only=True)
        for patches, expected in zip(network.block_patches(images, network.taps), theirs, strict=True):
            torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-4)
    network(images).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())  # several processes need this
    scales = {group["lr_scale"] for group in parameter_groups(replace(TRAINING, layer_decay=0.5), network)}
    assert len(scales) == 2 + 4 and max(scales) == 1


def test_later_patches_affect_only_the_denominators(network):
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[..., 48:, 48:] += 1.0  # the last patch
    before, after = (network.pyramid(each)[2] for each in (images, changed))
    assert not torch.equal(before[..., 0, 0], after[..., 0, 0])
    network.config = replace(TINY, mask="pre_softmax")
    before, after = (network.pyramid(each)[2] for each in (images, changed))
    torch.testing.assert_close(before[..., 0, 0], after[..., 0, 0])


def test_a_classifier_initializes_the_backbone(network, tmp_path):
    config = ModelConfig(**{**SMALL.to_dict(), "depth": 4, "patch_size": 16})
    torch.manual_seed(1)
    classifier = ILLaMA(config)
    write_weights(classifier.state_dict(), config, tmp_path / "weights.safetensors")
    before = network.head.weight.clone()
    initialize_from(network, tmp_path / "weights.safetensors", new_head=True)
    torch.testing.assert_close(network.blocks[3].attn.qkv.weight, classifier.blocks[3].attn.qkv.weight)
    assert network.pos_embed.shape[1] == 17 and torch.equal(network.head.weight, before)


def test_every_parameter_has_a_layer(network):
    groups = parameter_groups(replace(TRAINING, layer_decay=0.5), network)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = {name: scales[id(p)] for name, p in network.named_parameters()}
    assert named["head.weight"] == named["decoder.fusion_block.0.weight"] == 1
    assert named["blocks.3.mlp.fc1.weight"] == 2 * named["blocks.2.mlp.fc1.weight"]


def test_folded_batch_norms_change_nothing(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    folded = fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"depth": 3}, {"image_size": 16}, {"decoder_channels": 0}])
def test_wrong_configs_are_rejected(changes):
    with pytest.raises(UserError):
        UperNet(replace(TINY, **changes))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 6))
def test_scores_equal_those_of_another_library(seed, classes):
    generator = np.random.default_rng(seed)
    true = generator.integers(0, classes, (3, 7, 5))
    predicted = np.where(generator.random(true.shape) < 0.6, true, generator.integers(0, classes, true.shape))
    true[generator.random(true.shape) < 0.2] = IGNORED
    scores = Scores.of(sum(count_pixels(*pair, classes) for pair in zip(predicted, true, strict=True)))
    ignored = torch.from_numpy(np.where(true == IGNORED, -1, true))
    stats = smp.metrics.get_stats(
        torch.from_numpy(predicted), ignored, mode="multiclass", num_classes=classes, ignore_index=-1
    )
    tp, fp, fn, _ = (part.sum(0).double() for part in stats)
    iou, there = tp / (tp + fp + fn), tp + fn > 0
    assert scores.miou == pytest.approx(100 * iou.nanmean().item())
    assert [np.nan if value is None else value for value in scores.iou] == pytest.approx(
        (100 * iou).tolist(), nan_ok=True
    )
    assert scores.mean_accuracy == pytest.approx(100 * (tp / (tp + fn))[there].mean().item())
    assert scores.pixel_accuracy == pytest.approx(100 * (predicted == true)[true != IGNORED].mean())


def test_the_miou_drop_between_two_models():
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, (40, 20, 20))
    guess = np.where(generator.random(true.shape) < 0.9, true, 0)
    right, wrong = (
        np.stack([count_pixels(p, t, 3) for p, t in zip(maps, true, strict=True)]) for maps in (true, guess)
    )
    drop = miou_drop(right, wrong)
    assert drop.points == pytest.approx(100 - Scores.of(wrong.sum(0)).miou)
    assert drop.low < drop.points < drop.high < drop.low + 2
    assert miou_drop(wrong, wrong).high == 0


@given(length=st.integers(1, 300), size=st.integers(1, 60), overlap=st.floats(0, 0.9))
def test_windows_cover_a_side(length, size, overlap):
    found = window_starts(length, size, overlap)
    assert found[0] == 0 and found[-1] == max(0, length - size)
    assert all(0 < later - earlier <= size for earlier, later in pairwise(found))


@pytest.mark.parametrize("shape", [(8, 8), (8, 21), (20, 9), (5, 30)])
@pytest.mark.parametrize("views", [Views(), Views((0.5, 1.0, 1.75), flip=True)])
def test_sliding_windows_keep_the_place_of_every_pixel(shape, views):
    """With a network that classifies single pixels: right halves are bright, left halves dark."""
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    image[:, :, shape[1] // 2 :] = 255

    def infer(windows):
        assert windows.shape[1:] == (3, 8, 8) and windows.dtype == np.float32
        bright = windows[:, :1] - 127
        return np.concatenate([-bright, bright], axis=1)

    predicted = predict_map(infer, image, PLAIN, views)
    assert predicted.shape == shape
    edge = shape[1] // 2
    assert (predicted[:, : edge - 1] == 0).all() and (predicted[:, edge + 1 :] == 1).all()


def test_images_and_maps_are_augmented_alike(tmp_path):
    """The red channel of the image equals its map, also after augmentation without color distortion."""
    data = SegmentationFolder(_draw(tmp_path / "data", train=2, validation=1))
    labels = np.repeat(np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4 + 1, 8, 0), 12, 1)
    for index in range(2):
        Image.fromarray(labels).save(tmp_path / f"data/annotations/training/{index:04}.png")
        Image.fromarray(np.repeat(labels[..., None] * 60, 3, 2)).save(
            tmp_path / f"data/images/training/{index:04}.jpg", quality=100
        )
    images = AugmentedMaps(data.training()[0], data.preprocessing(64, 3), seed=0)
    images.transform.transforms = [t for t in images.transform.transforms if "Photometric" not in str(t)]
    sizes = set()
    for epoch in range(12):
        image, found = images[epoch, 0]
        again = images[epoch, 0]
        assert torch.equal(image, again[0]) and torch.equal(found, again[1])
        assert image.shape == (3, 64, 64) and found.shape == (64, 64) and type(image) is torch.Tensor
        gray = ((image[0] * 0.229 + 0.485) * 255 / 60 - 1).round()
        counted = found != IGNORED
        assert (gray[counted] == found[counted]).float().mean() > 0.85  # the others are on edges
        sizes.add(int(counted.sum()))
    assert len(sizes) > 1  # some were smaller than the crop


def _no_classes(folder):
    (folder / "objectInfo150.txt").unlink()


def _no_annotation(folder):
    (folder / "annotations/validation/0001.png").unlink()


def _broken(folder):
    (folder / "annotations/validation/0000.png").write_bytes(b"not a PNG")


def _colored(folder):
    Image.new("RGB", (64, 64)).save(folder / "annotations/validation/0000.png")


def _another_size(folder):
    Image.new("L", (10, 10)).save(folder / "annotations/validation/0000.png")


def _unknown_class(folder):
    path = folder / "annotations/validation/0000.png"
    Image.fromarray(np.full_like(Image.open(path), 5)).save(path)


@pytest.mark.parametrize(
    ("damage", "identifier"),
    [
        (_no_classes, "objectInfo"),
        (_no_annotation, "0001.png"),
        (_broken, "0000.png"),
        (_colored, "0000.png .*one byte per pixel"),
        (_another_size, "10 x 10 pixels"),
        (_unknown_class, "class 5, .*4"),
    ],
)
def test_wrong_folders_are_rejected(damage, identifier, tmp_path):
    folder = _draw(tmp_path / "data", train=1, validation=2)
    damage(folder)
    with pytest.raises(UserError, match=identifier):
        SegmentationFolder(folder).test()[0]


def test_the_loss_ignores_pixels_without_a_class():
    logits, targets = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    targets[0, :2] = IGNORED
    flat = logits.permute(0, 2, 3, 1)[targets != IGNORED]
    expected = nn.functional.cross_entropy(flat, targets[targets != IGNORED], label_smoothing=0.1)
    torch.testing.assert_close(map_loss(logits, logits, targets, 0.1), expected)
    assert map_loss(logits, logits, torch.full_like(targets, IGNORED)) == 0


def test_an_interrupted_run_ends_with_the_same_weights(shapes, tmp_path):
    alone = Processes(0, 1, torch.device("cpu"))
    options = replace(TRAINING, data=str(shapes), out=tmp_path / "whole", epochs=1, checkpoint_steps=2, batch_size=16)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = start_segmentation(options, alone)
    fit(whole)
    killed = start_segmentation(replace(options, out=tmp_path / "killed"), alone)
    proper, losses = killed.task.loss, []

    def loss(*arguments):
        losses.append(proper(*arguments))
        if len(losses) > 5:
            raise KeyboardInterrupt
        return losses[-1]

    killed.task = replace(killed.task, loss=loss)
    with pytest.raises(KeyboardInterrupt):
        fit(killed)
    resumed = start_segmentation(replace(options, out=tmp_path / "killed"), alone)
    assert resumed.progress.step == 2
    fit(resumed)
    for name, value in whole.kept_weights().items():
        assert torch.equal(value, resumed.kept_weights()[name]), name


def test_training_learns(trained, shapes):
    manifest = Manifest.read(trained)
    data = SegmentationFolder(shapes)
    background = sum(count_pixels(np.zeros_like(labels), np.asarray(labels), 4) for _, labels in data.test())
    assert manifest.scores.values[TRAINED] > 2.5 * Scores.of(background).miou
    checkpoint = load_segmentation(trained)
    assert checkpoint.classes == ("background", "rectangle", "disc", "ring")
    assert checkpoint.model.config == TINY and not checkpoint.model.training


def test_quantized_files_have_the_scores_of_the_network(trained, shapes, tmp_path, capsys):
    out = tmp_path / "ptq"
    quantize(PtqSegmentationOptions(trained, shapes, ("int8",), 8, out))
    bundles = tuple(out / name for name in ("fp32", "fp16", "int8"))
    with pytest.raises(UserError, match="cannot write"):
        evaluate(SegmentationEvalOptions(bundles, shapes, out=out / "fp32" / "model.onnx" / "result"))
    evaluate(SegmentationEvalOptions(bundles, shapes, out=tmp_path / "result-1.5"))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if ".onnx" in line]
    mious = {row[0].removeprefix("| "): float(row[1]) for row in rows}
    assert len(mious) == 4
    assert mious["fp32/model.onnx"] == pytest.approx(Manifest.read(trained).scores.values[TRAINED], abs=0.1)
    assert all(abs(miou - mious["fp32/model.onnx"]) < 3 for miou in mious.values())
    assert (tmp_path / "result-1.5.json").exists() and (tmp_path / "result-1.5.md").exists()

    int8 = out / "int8"
    layers = {each.layer: (each.weight, each.input) for each in Manifest.read(int8).quantization.layers}
    assert layers["decoder.fusion_block.0"] == ("int8 per channel", "uint8 asymmetric"), layers
    assert (int8 / "model.onnx").stat().st_size < 0.4 * (out / "fp32" / "model.onnx").stat().st_size
    if library := find_library():
        assert EngineRecord.read(build_bundle(library, int8)).attentions == 4


def test_a_network_of_timm_is_trained_and_quantized(shapes, tmp_path, capsys):
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=64, num_classes=0, **TIMM)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    options = SegmentationOptions(
        str(shapes), model="timm:vit_small_patch14_reg4_dinov2", init=tmp_path / "vit.safetensors", decoder_channels=16,
        model_args=",".join(f"{name}={value}" for name, value in TIMM.items()), epochs=8, batch_size=8, micro_batch=8,
        learning_rate=3e-3, warmup_epochs=1, workers=0, autocast="float32", drop_path=0.1, out=tmp_path / "run",
    )  # fmt: skip
    train(options)
    bundle = tmp_path / "run" / "bundle"
    score = Manifest.read(bundle).scores.values[TRAINED]
    assert score > 25 and load_segmentation(bundle).model.config.options["embed_dim"] == 64
    quantize(PtqSegmentationOptions(bundle, shapes, ("int8",), 8, tmp_path / "ptq"))
    capsys.readouterr()
    paths = tuple(tmp_path / "ptq" / name for name in ("fp32", "fp16", "int8"))
    evaluate(SegmentationEvalOptions(paths, shapes, out=tmp_path / "result"))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if ".onnx" in line]
    assert len(rows) == 4 and all(float(row[1]) == pytest.approx(score, abs=2) for row in rows)
    if library := find_library():
        assert EngineRecord.read(build_bundle(library, tmp_path / "ptq" / "int8")).attentions == 4

    own = "takes its weights from --init"
    for wrong, words in (
        ({"init": None}, own), ({"dropout": 0.1}, own), ({"depth": 4}, own), ({"soft_mask": "linear"}, own),
        ({"model_args": "checkpoint_path=/etc/passwd"}, "checkpoint_path"), ({"model": "hf"}, "--model-args"),
        ({"model": "hf", "model_args": ""}, "folder of Hugging Face"), ({"image_size": 60}, "multiple"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            train(replace(options, **wrong, out=tmp_path / "wrong"))
    manifest = Manifest.read(bundle)
    replace(manifest, preprocessing=replace(manifest.preprocessing, size=(32, 32))).write(bundle)
    with pytest.raises(UserError, match="32, 32"):
        load_segmentation(bundle)
    theirs = {**manifest.config["options"], "checkpoint_path": "weights.pth"}
    for change, words in (
        ({"options": theirs}, "checkpoint_path"), ({"image_size": -64}, "positive"), ({"mask": "post_softmax"}, "mask"),
        ({"features": [7]}, "features"), ({"image_size": 128}, "does not fit"),
    ):  # fmt: skip
        replace(manifest, config={**manifest.config, **change}).write(bundle)
        with pytest.raises(UserError, match=words):
            load_segmentation(bundle)


class _Convolutions(MaskedNetwork):
    """Padded, strided and grouped convolutions after a Relu, as in a decoder."""

    def __init__(self):
        super().__init__()
        self.config = replace(TINY, image_size=16, patch_size=8)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, (3, 5), stride=2, padding=(1, 2), groups=2)
        self.third = nn.Conv2d(8, 4, 3, padding=2, dilation=2)

    def forward(self, images):
        return self.third(self.second(self.first(images).relu()).relu() - 0.2)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_files_with_quantized_convolutions_equal_pytorch(name, tmp_path):
    torch.manual_seed(0)
    model, images = _Convolutions().eval(), torch.randn(4, 3, 16, 16)
    scheme = replace(
        shipped_scheme(name),
        tensors={"*.weight": shipped_scheme(name).spec("x.weight"), "*.input": shipped_scheme(name).spec("x.input")},
        smooth={},
    )
    assert len(resolve(scheme, model).tensors) == 6
    quantized = calibrate(model, resolve(scheme, model), [images])
    expected, exact = quantized(images).detach(), model(images).detach()
    noise = (expected - exact).norm() / exact.norm()
    assert 0 < noise < (0.02 if name == "int8" else 0.06)
    files = (
        ("plain", torch.float32, CPU_ONNX, 0.1),
        ("fused", torch.float32, FUSED_ONNX, 0.1),
        ("fused", torch.float16, FUSED_ONNX, 0.8),
    )
    for form, dtype, file, share in files:  # in half precision, many values are on the other side of a tie
        export_onnx(quantized, tmp_path / file, form, dtype)
        found = torch.from_numpy(OnnxRuntimeEngine(tmp_path / file).infer(images.numpy()))
        assert (found - expected).norm() < share * noise * expected.norm(), form


def test_schemes_need_different_names(trained, shapes, tmp_path):
    for name, file in (("fp16", "mine"), ("int8", "mine"), ("own", "one"), ("own", "two")):
        write_scheme(replace(shipped_scheme("int8"), name=name), tmp_path / f"{file}-{name}.yaml")
    for clash, files in (("fp16", ["mine-fp16"]), ("int8", ["mine-int8"]), ("own", ["one-own", "two-own"])):
        schemes = ("int8", *(str(tmp_path / f"{file}.yaml") for file in files))
        with pytest.raises(UserError, match=f"two schemes are called '{clash}'"):
            quantize(PtqSegmentationOptions(trained, shapes, schemes, 8, tmp_path / "ptq"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        quantize(PtqSegmentationOptions(trained, shapes, ("int8",), 8, tmp_path / "file"))


def test_errors_are_one_line(shapes, small_bundle, tmp_path):
    with pytest.raises(UserError, match="--seed"):
        check_bounds(SegmentationEvalOptions((small_bundle,), shapes, seed=-1))
    with pytest.raises(UserError, match=r"train_segmentation\.py"):
        quantize(PtqSegmentationOptions(small_bundle, shapes, out=tmp_path / "ptq"))
    with pytest.raises(UserError, match="classes"):
        evaluate(SegmentationEvalOptions((small_bundle,), shapes))
    with pytest.raises(UserError, match="no pixel"):
        Scores.of(np.zeros((3, 4), int))
    with pytest.raises(UserError, match="overlap"):
        Views(overlap=1.0)
    assert not (tmp_path / "ptq").exists()
    result = run_command("illama/train_segmentation.py", "--data", tmp_path, "--out", tmp_path / "run")
    assert_one_line_error(result, "objectInfo")
    assert not (tmp_path / "run").exists()
