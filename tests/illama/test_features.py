"""Networks without a classifier: features equal to timm's, in files, in reports, in predictions, and served."""

import copy
import io
import json
import re

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import entropy
from support import assert_one_line_error, write_untimed_baseline
from timm.models.vision_transformer import VisionTransformer
from timm_networks import NAMED, build, images_for, saved

from deploy.runtimes.image_input import ImageInput
from deploy.runtimes.open_engine import open_engine
from deploy.serving.known_answer import KnownAnswer
from deploy.serving.repository import create_known_answer, write_repository
from deploy.serving.serving_options import ServingOptions
from deploy.trt.library import find_library
from deploy.trt.record import EngineRecord, find_engines
from illama import ILLaMA, ModelConfig
from illama.bundle import SHIPPED
from illama.checkpoints.load import load_checkpoint
from illama.checkpoints.timm_checkpoint import load_timm
from illama.errors import UserError
from illama.inference import load_images
from illama.manifest import Manifest
from illama.models.timm_vit import to_causal, to_quantizable
from illama.nearest_neighbors import NearestNeighbors, unit_features
from illama.options import SourceOptions
from quant.export.onnx_export import export_onnx
from quant.inputs import open_inputs
from quant.mixed_precision.layer_effects import Tally
from quant.quantizers.qat_run import validation_classifier
from quant.quantizers.rotation import rotate
from quant.schemes.scheme import Rotations, resolve, shipped_scheme
from quant.schemes.shipped import SHIPPED_SCHEMES

KINDS = [*NAMED, "avg", "map", "prr", "token_with_fc_norm", "no_pooling", "vit_small_patch16_dinov3",
         "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"]  # fmt: skip
SAVED = ["small_vit_plain", "small_vit_registers", "small_vit_average", "small_vit_latent_pool", "small_eva02"]


def theirs(vit, images, head="none"):
    """timm's own features."""
    with torch.no_grad():
        tokens = vit.forward_features(images)
        return vit.fc_norm(tokens) if head == "tokens" else vit.forward_head(tokens, pre_logits=True)


@pytest.mark.parametrize("name", KINDS)
def test_a_network_without_classes_has_timms_features(name):
    vit, images = build(name), images_for(name)
    expected = theirs(vit, images)
    vit.reset_classifier(0)
    model = to_quantizable(vit)
    assert model.config.num_classes == 0 and model.config.features == tuple(expected.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert tuple(to_causal(vit)(images).shape[1:]) == model.config.features


@pytest.mark.parametrize("name", KINDS)
def test_rotations_keep_features(name):
    vit = build(name)
    vit.reset_classifier(0)
    model = to_quantizable(vit).double()
    rotated, images = copy.deepcopy(model), images_for(name).double()
    rotate(rotated, Rotations(residual="auto", values="auto"))
    with torch.no_grad():
        torch.testing.assert_close(rotated(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", ["none", "tokens"])
@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("with_head", [True, False])
def test_files_with_and_without_a_classifier(with_head, name, head, tmp_path):
    vit, path = saved(tmp_path, name)
    if not with_head:
        save_file({key: value for key, value in load_file(path).items() if not key.startswith("head.")}, path)
    images = torch.randn(2, 3, 32, 32)
    model = load_timm(name, path, head=head).model
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(vit, images, head), rtol=1e-4, atol=1e-5)


def test_a_projection_is_kept_as_an_embedding(tmp_path):
    vit, path = saved(tmp_path, "small_vit_plain")
    loaded, images = load_timm("small_vit_plain", path, head="embedding"), torch.randn(2, 3, 32, 32)
    assert loaded.model.config.features == (5,) and loaded.classes == ()
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), vit(images), rtol=1e-4, atol=1e-5)


def test_what_a_file_cannot_compute_is_refused(tmp_path):
    _, path = saved(tmp_path, "small_vit_plain")
    save_file({key: value for key, value in load_file(path).items() if not key.startswith("head.")}, path)
    for head in ("classes", "embedding"):
        with pytest.raises(UserError, match="--head none"):
            load_timm("small_vit_plain", path, head=head)
    torch.manual_seed(0)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32)
    torch.save(distilled.state_dict(), tmp_path / "distilled.pth")
    with pytest.raises(UserError, match="--head none"):
        load_timm("deit_tiny_distilled_patch16_224", tmp_path / "distilled.pth", head="tokens")
    with pytest.raises(UserError, match="--head none"):
        open_inputs(SourceOptions(head="embedding"), needs_labels=False)


@pytest.mark.parametrize("head", ["none", "tokens"])
def test_an_illama_gives_its_class_token_or_all_tokens(head):
    shipped = load_checkpoint(SHIPPED).model
    inputs, images = open_inputs(SourceOptions(head=head), needs_labels=False), torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        tokens = shipped.forward_features(images)
        torch.testing.assert_close(inputs.model(images), tokens[:, 0] if head == "none" else tokens)
    assert inputs.classes == () and inputs.model.config.features == ((128,) if head == "none" else (50, 128))
    config = ModelConfig(image_size=16, patch_size=4, width=32, depth=1, heads=2, num_classes=0)
    assert ILLaMA(config)(torch.zeros(1, 3, 16, 16)).shape == (1, 32)


@pytest.mark.parametrize("name", SHIPPED_SCHEMES)
def test_every_scheme_fits_a_network_without_a_classifier(name):
    vit = VisionTransformer(16, 4, embed_dim=128, depth=1, num_heads=2, num_classes=0)
    plan = resolve(shipped_scheme(name), to_quantizable(vit))
    assert not any("head" in tensor for tensor in plan.tensors)


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_a_file_names_its_output(form, tmp_path):
    _, path = saved(tmp_path, "small_vit_registers")
    model = load_timm("small_vit_registers", path, head="tokens").model
    export_onnx(model, tmp_path / "model.onnx", form)
    (output,) = onnx.load(tmp_path / "model.onnx").graph.output
    assert output.name == "features"
    assert [each.dim_value for each in output.type.tensor_type.shape.dim][1:] == list(model.config.features) == [21, 32]


def test_nearest_neighbors_vote_by_similarity():
    """Against a loop over the gallery."""
    random = np.random.default_rng(0)
    gallery, labels, features = random.normal(size=(60, 7)), random.integers(0, 4, 60), random.normal(size=(9, 7))
    logits = NearestNeighbors(unit_features(gallery), labels, 4).logits(features)
    for row, feature in zip(logits, features, strict=True):
        cosines = [float(feature @ each / np.linalg.norm(feature) / np.linalg.norm(each)) for each in gallery]
        nearest, votes = sorted(range(60), key=lambda index: -cosines[index])[:20], [0.0] * 4
        for index in nearest:
            votes[labels[index]] += np.exp((cosines[index] - 1) / 0.07)
        voted = [place for place in range(4) if votes[place]]
        np.testing.assert_allclose(row[voted], np.log(votes)[voted], rtol=1e-4)
        assert set(np.argsort(row)[: 4 - len(voted)]) == set(range(4)) - set(voted)
    scaled = NearestNeighbors(unit_features(gallery), labels, 4).logits(features * 3)
    np.testing.assert_allclose(scaled, logits, rtol=1e-5)


def test_the_effect_on_features_agrees_with_its_definition():
    """Against scipy's softmax over cosines, and the nearest neighbors' classes."""
    random = np.random.default_rng(1)
    neighbors = NearestNeighbors(unit_features(random.normal(size=(40, 7))), random.integers(0, 3, 40), 3)
    exact, labels = random.normal(size=(30, 7)), random.integers(0, 3, 30)
    noisy, tally = exact + 0.3 * random.normal(size=(30, 7)), Tally(neighbors)
    for part in (slice(0, 10), slice(10, 30)):
        tally.add(*map(torch.from_numpy, (exact[part], noisy[part], labels[part])))
    p, q = (softmax(cdist(each, neighbors.gallery, "cosine") / -0.07, axis=1) for each in (exact, noisy))
    right, right_too = (neighbors.logits(each).argmax(1) == labels for each in (exact, noisy))
    effect = tally.effect()
    assert effect.kl == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-5) and effect.kl > 0.1
    assert effect.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / ((noisy - exact) ** 2).sum()))
    assert (effect.lost, effect.gained) == ((right & ~right_too).sum(), (right_too & ~right).sum())
    assert effect.lost and effect.gained and effect.right == right.sum()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Bright and dark pictures with noise: with classes, and flat."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(96):
        label, split = ("bright", "dark")[number % 2], "val" if number % 3 == 0 else "train"
        pixels = random.normal(170 if label == "bright" else 80, 25, (32, 32, 3)).clip(0, 255).astype(np.uint8)
        for target in (folder / "labeled" / split / label, folder / "flat"):
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("weights"), "small_vit_plain", img_size=32)[1]


def quantize(run_here, weights, data, out, head="none", *more):
    result = run_here(
        "quant/ptq.py", "--model", "timm:small_vit_plain", "--checkpoint", weights, "--data", data, "--head", head,
        "--schemes", "int8", "--no-engines", "--seconds", 0.1, "--calibration-images", 24, "--out", out, *more,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("head", ["none", "tokens"])
def test_a_report_classifies_by_neighbors(head, run_here, weights, pictures, tmp_path):
    text, report = quantize(run_here, weights, pictures / "labeled", tmp_path / "out", head)
    rows = {row["name"]: row for row in report["rows"]}
    assert "k-NN top-1" in text and set(report["classes"]) == {"bright", "dark"}
    first, other = rows["fp32, ONNX Runtime, CPU"], rows["int8, ONNX Runtime, CPU"]
    assert first["top1"]["percent"] > 90 and first["reference"] and first["cosine"] == pytest.approx(1)
    assert other["temperature"] is None and other["reliability"] is None and 20 < other["sqnr"] < 80
    # The same by hand: engines' features of the test images, cosine and SQNR.
    inputs = open_inputs(
        SourceOptions(weights, "timm:small_vit_plain", str(pictures / "labeled"), head=head), needs_labels=False
    )
    images, _ = load_images(inputs.data.test(), inputs.preprocessing.transform())
    exact, found = (
        open_engine(tmp_path / "out" / scheme / "model.onnx", "onnxruntime").infer(images).reshape(len(images), -1)
        for scheme in ("fp32", "int8")
    )
    cosines = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    assert other["cosine"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    noise = float(10 * np.log10((exact.astype(float) ** 2).sum() / ((found - exact).astype(float) ** 2).sum()))
    assert other["sqnr"] == pytest.approx(noise, abs=1e-3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "k-NN top-1" in page and "Calibration</h2>" not in page


def test_a_report_of_pictures_without_classes(run_here, weights, pictures, tmp_path):
    text, report = quantize(run_here, weights, pictures / "flat", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1-NN agreement" in text and not any(word in text + page for word in ("robustness.py", "48 classes"))
    other = next(row for row in report["rows"] if row["name"] == "int8, ONNX Runtime, CPU")
    assert other["change"]["agreement"] == pytest.approx(other["top1"]["percent"]) and other["cosine"] > 0.99
    manifest = Manifest.read(tmp_path / "out" / "int8")
    assert manifest.classes == () and manifest.features == (32,) and manifest.output == "features"
    for command in ("accuracy", "robustness"):
        result = run_here(f"eval/{command}.py", tmp_path / "out" / "int8", "--data", pictures / "labeled")
        assert result.returncode == 2 and "features" in result.stderr and "Traceback" not in result.stderr
    baseline = write_untimed_baseline(tmp_path / "out" / "report.json", tmp_path / "untimed.json")
    again = run_here("eval/tradeoff.py", tmp_path / "out", "--seconds", 0.1, "--out", tmp_path / "again",
                     "--fail-on-regression", baseline)  # fmt: skip
    assert again.returncode == 0, again.stderr
    fewer = run_here("eval/tradeoff.py", tmp_path / "out", "--seconds", 0.1, "--out", tmp_path / "fewer",
                     "--calibration-images", 12, "--fail-on-regression", baseline)  # fmt: skip
    assert fewer.returncode == 2 and "another" in fewer.stderr
    repeated = json.loads((tmp_path / "again" / "report.json").read_text())
    assert [row["top1"] for row in repeated["rows"]] == [row["top1"] for row in report["rows"]]


@pytest.mark.parametrize("head", ["none", "tokens"])
def test_sensitivity_search_and_training(head, run_here, weights, pictures, tmp_path):
    def run(command, *options):
        inputs = ("--model", "timm:small_vit_plain", "--checkpoint", weights, "--data", pictures / "labeled")
        result = run_here(
            f"quant/{command}.py", *inputs, "--head", head, "--calibration-images", 24, *options,
            "--out", tmp_path / command,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "k-NN top-1 lost" in run("sensitivity", "--images", 12)
    found = json.loads((tmp_path / "sensitivity" / "sensitivity.json").read_text())
    assert 20 < found["all"]["sqnr_db"] < 80 and all(0 < row["kl"] < 1 for row in found["layers"])
    if head == "none":
        run("search", "--max-megabytes", 1, "--images", 12, "--formats", "int8", "w4a8")
        assert Manifest.read(tmp_path / "search").features == (32,)
        files = sorted((pictures / "flat").glob("*.png"))[:2]
        saved_to = ("--save", tmp_path / "features.npy")
        result = run_here("deploy/predict.py", "--engine", tmp_path / "search" / "model.onnx", *files, *saved_to)
        assert result.returncode == 0 and np.load(tmp_path / "features.npy").shape == (2, 32), result.stderr
    training = ("--scheme", "w4a4", "--epochs", 6, "--batch-size", 8, "--micro-batch", 8, "--workers", 0,
                "--crop-padding", 0, "--learning-rate", 1e-3, "--ema-decay", 0)  # fmt: skip
    assert "k-NN top-1" in run("qat", *training)
    losses = [float(line.split(",")[4]) for line in (tmp_path / "qat" / "log.csv").read_text().splitlines()[1:]]
    assert losses[-1] < losses[0] < 1  # the power of the noise, relative to the features'
    bundle = tmp_path / "qat" / "w4a4-qat"
    assert Manifest.read(bundle).scores.values["fp32"] > 90
    again = run_here("quant/debug_layers.py", bundle)
    assert again.returncode == 0 and "No mismatch" in again.stdout, again.stdout + again.stderr
    asked = ("--distillation", 0.5, "--out", tmp_path / "labels", "--head", head)
    refused = run_here("quant/qat.py", "--model", "timm:small_vit_plain", "--checkpoint", weights,
                       "--data", pictures / "labeled", "--calibration-images", 24, *asked)  # fmt: skip
    assert_one_line_error(refused, "--distillation 1")


def test_no_validation_image_is_a_neighbor_in_training(weights, pictures, monkeypatch):
    inputs = open_inputs(SourceOptions(weights, "timm:small_vit_plain", str(pictures / "labeled"), head="none"))
    (training, held_out), asked, ask = inputs.data.training(), [], inputs.neighbors_of

    def note(_, images):
        asked.extend(images.indices)
        return ask(images)

    monkeypatch.setattr(type(inputs), "neighbors_of", note)
    validation_classifier(inputs)
    assert asked and not {training.indices[index] for index in asked} & set(held_out.indices)


def test_images_that_are_not_square_through_the_whole_path(run_here, weights, pictures, tmp_path):
    out = tmp_path / "out"
    quantize(run_here, weights, pictures / "flat", out, "none", "--images", 4, "--image-size", 48, 32)
    manifest = Manifest.read(out / "int8")
    assert manifest.preprocessing.size == (48, 32) and manifest.provenance.source.image_size == (48, 32)
    answer = create_known_answer(out / "int8" / "model.onnx", "onnxruntime")  # that of a golden image, as a PNG file
    image = ImageInput.of(manifest).read(io.BytesIO(answer.image), str)
    found = open_engine(out / "int8" / "model.onnx", "onnxruntime").infer(image[None])[0]
    assert answer.matches(found)
    quantize(run_here, weights, pictures / "flat", out, "none", "--images", 4, "--image-size", 64)


def test_predictions_repositories_and_engines(run_here, weights, pictures, tmp_path):
    out = tmp_path / "out"
    quantize(run_here, weights, pictures / "flat", out, "tokens", "--images", 4)
    files = sorted((pictures / "flat").glob("*.png"))[:3]
    result = run_here(
        "deploy/predict.py", "--engine", out / "int8", *files, "--save", tmp_path / "new" / "features.npy"
    )
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"\(17, 32\)", result.stdout)) == 3
    features = np.load(tmp_path / "new" / "features.npy")
    assert features.shape == (3, 17, 32) and np.isfinite(features).all()
    write_repository(tmp_path / "served", {"m": [out / "int8"]}, ServingOptions())
    config = (tmp_path / "served" / "m-network" / "config.pbtxt").read_text()
    assert 'name: "features"' in config and not list((tmp_path / "served").rglob("labels.txt"))
    if find_library(None):
        built = run_here("deploy/build.py", out / "int8", "--batch", 1)
        assert built.returncode == 0, built.stderr
        records = [EngineRecord.read(engine) for engine in find_engines(out / "int8")]
        assert [each.outputs["features"][1] for each in records] == [(-1, 17, 32)] and records[0].fused
    answer = create_known_answer(out / "int8" / "model.onnx", "onnxruntime")
    assert isinstance(answer, KnownAnswer) and max(answer.positions) < 17 * 32
