"""Quantization-aware training: LSQ's gradients, the loss, resuming, several processes, and the files at the end."""

import copy
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from support import SMALL, assert_one_line_error, run_command, write_bundle, write_images
from timm.layers import DropPath
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from timm_networks import SMALL as SMALL_VIT
from timm_networks import saved

from deploy.runtimes.onnxruntime_engine import OnnxRuntimeEngine
from eval.metrics.paired import paired_drop
from illama import ILLaMA
from illama.bundle import CPU_ONNX, FUSED_ONNX, WEIGHTS
from illama.checkpoints.load import load_checkpoint
from illama.errors import UserError
from illama.manifest import Manifest
from illama.models.timm_vit import to_quantizable
from illama.training.distributed import Processes
from illama.training.recipe import TrainingOptions, read_recipe, recipe_names
from illama.training.trainer import fit, label_loss, make_optimizer
from quant import debug_layers
from quant.export.weights import read_quantized_weights
from quant.qat import DEFAULT_RECIPE, RECIPES, QatOptions
from quant.quantizers.calibrate import calibrate
from quant.quantizers.distillation import Distillation, make_scales_buffers, make_scales_parameters, scale_groups
from quant.quantizers.layers import WeightQuantizer, fake_quantize, lsq_gradient, quantize_dequantize, quantizers
from quant.quantizers.qat_run import open_job, start_run, with_dropout, write_qat_bundle
from quant.quantizers.torchao_backend import load_torchao
from quant.schemes.formats import FORMATS, TensorSpec
from quant.schemes.scheme import read_scheme, resolve, shipped_scheme, write_scheme
from quant.schemes.shipped import SHIPPED_SCHEMES

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("name", sorted(FORMATS))
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), step=st.floats(0.05, 3.0))
def test_gradients_are_equation_3_of_lsq(name, seed, step):
    """The equation of the paper in float64; a float format rounds to its own values."""
    dtype = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    values, upstream = (torch.randn(3, 40, generator=generator, dtype=torch.float64) * dtype.high for _ in range(2))
    values.requires_grad_()
    scale = torch.tensor([[step], [2 * step], [step / 2]], dtype=torch.float64, requires_grad=True)
    (fake_quantize(values, lsq_gradient(scale, 40, dtype), dtype) * upstream).sum().backward()

    ratio = (values / scale).detach().numpy()
    kinds = {"nvfp4": ml_dtypes.float4_e2m1fn}
    floats = ratio.astype(kinds.get(name, ml_dtypes.float8_e4m3fn)).astype(np.float64)
    nearest = np.rint(ratio) if dtype.rounds else floats
    inside = (ratio > dtype.low) & (ratio < dtype.high)
    by_scale = np.where(inside, nearest - ratio, np.where(ratio <= dtype.low, dtype.low, dtype.high))
    wanted = (by_scale * upstream.numpy()).sum(1, keepdims=True) / np.sqrt(40 * dtype.high)
    np.testing.assert_allclose(scale.grad.numpy(), wanted, rtol=1e-9, atol=1e-9 * dtype.high)
    np.testing.assert_allclose(values.grad.numpy(), inside * upstream.numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("zero_point", [0, 3])
def test_training_rounds_as_the_exported_file_does(name, zero_point):
    dtype = FORMATS[name]
    if zero_point and dtype.signed:
        pytest.skip("signed formats are symmetric")
    x = torch.cat([torch.randn(5000) * dtype.high, torch.arange(-40, 40) * 0.5])  # the halves are ties
    for scale in (torch.tensor(1.0), torch.tensor(0.37)):
        trained = fake_quantize(x, scale, dtype, zero_point)
        assert torch.equal(trained, quantize_dequantize(x, scale, name, zero_point))
        half = fake_quantize(x.bfloat16(), scale, dtype, zero_point)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, quantize_dequantize(x.bfloat16().float(), scale, name, zero_point).bfloat16())


@pytest.fixture(scope="module")
def network():
    """A random network whose logits differ from image to image."""
    torch.manual_seed(0)
    model = ILLaMA(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["int8", "fp8-attention", "w4a8", "w4a4"])
def quantized(request, network, images):
    # GPTQ's weights are on the grid, where the gradient of their scales is 0.
    return calibrate(network, resolve(shipped_scheme(request.param).rounding_to_nearest(), network), [images])


def test_scales_as_parameters_get_gradients_and_change_no_output(quantized, images):
    model = copy.deepcopy(quantized)
    make_scales_parameters(model)
    assert model.state_dict().keys() == quantized.state_dict().keys()
    assert torch.equal(model(images), quantized(images))
    model.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(quantizer.scale.grad.any() for _, quantizer in quantizers(model))
    make_scales_buffers(model)
    assert torch.equal(model.eval()(images), quantized(images))
    assert not any("scale" in name for name, _ in model.named_parameters())


def test_a_scale_stays_positive_in_training():
    quantizer = WeightQuantizer(TensorSpec("int4", "channel"), torch.ones(3, 1))
    quantizer.make_scale_parameter()
    with torch.no_grad():
        quantizer.scale[0] = -1.0
    assert quantizer(torch.randn(3, 5)).isfinite().all()
    quantizer.make_scale_buffer()
    assert (quantizer.scale > 0).all()


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_scales_have_their_own_rate_and_no_decay(quantized, layer_decay):
    model = copy.deepcopy(quantized)
    make_scales_parameters(model)
    optimizer = make_optimizer(TrainingOptions(weight_decay=0.3, layer_decay=layer_decay), model, scale_groups(2.0))
    seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        if name.endswith("scale"):
            assert group["weight_decay"] == 0 and len(group["params"]) == 1
            assert group["lr_scale"] == pytest.approx(2 * float(parameter.detach().mean()))
        elif name.endswith("qkv.weight"):
            assert group["weight_decay"] == 0.3


def test_the_distillation_loss_is_hinton_s(network, images):
    recipe = TrainingOptions(autocast="float32")
    logits, targets = torch.randn(16, 3), torch.randn(16, 3).softmax(1)
    network.soft_mask = 1.0
    taught = Distillation(network, 3.0, 0.7, recipe, torch.device("cpu"))
    network.soft_mask = 0.0
    with torch.no_grad():
        teacher = network(images)
    student, wanted = (log_softmax(x.double().numpy() / 3, axis=1) for x in (logits, teacher))
    soft = 9 * (np.exp(wanted) * (wanted - student)).sum(1).mean()
    hard = -(targets.double().numpy() * log_softmax(logits.double().numpy(), axis=1)).sum(1).mean()
    assert float(taught(images, logits, targets)) == pytest.approx(0.7 * soft + 0.3 * hard, rel=1e-5)
    only = Distillation(network, 3.0, 1.0, recipe, torch.device("cpu"))
    assert float(only(images, teacher, targets)) == pytest.approx(0, abs=1e-6)
    labels = Distillation(network, 3.0, 0.0, recipe, torch.device("cpu"))
    assert float(labels(images, logits, targets)) == pytest.approx(float(label_loss(images, logits, targets)))


PAPER = {  # arXiv 2404.06773, quantization-aware training
    "qat-in1k-tiny": (3e-3, 0.0, 0.1, 0.1, "constant", 50),
    "qat-in1k-small": (4e-3, 0.1, 0.5, 0.5, "linear", 50),
}


@pytest.mark.parametrize("name", recipe_names(RECIPES))
def test_recipes(name):
    recipe = read_recipe(QatOptions, RECIPES, name)
    assert recipe.scheme in SHIPPED_SCHEMES
    if name in PAPER:
        own = (recipe.learning_rate, recipe.drop_path, recipe.mixup, recipe.cutmix, recipe.soft_mask)
        assert (*own, recipe.soft_mask_epochs) == PAPER[name]
        common = (recipe.optimizer, recipe.batch_size, recipe.epochs, recipe.weight_decay, recipe.warmup_epochs)
        assert common == ("adamw", 4096, 300, 0.05, 5)
        assert recipe.scheme == "int8-attention"
        augmentation = (recipe.rand_augment, recipe.erasing, recipe.label_smoothing, recipe.distillation)
        assert augmentation == ("rand-m9-mstd0.5-inc1", 0.25, 0.1, 0)


@pytest.fixture(scope="module")
def material(tmp_path_factory, network):
    """A bundle, 24 images to train on, and a scheme with an asymmetric tensor."""
    folder = tmp_path_factory.mktemp("qat")
    write_bundle(folder / "bundle", SMALL, network.state_dict())
    write_images(folder / "images")
    (folder / "mine.yaml").write_text(
        "base: w4a4\nreconstruction_iterations: 2\ntensors: {'*.fc2.input': {format: uint8, symmetric: false}}\n"
    )
    return folder


def _options(material, out, **more):
    options = read_recipe(QatOptions, RECIPES, DEFAULT_RECIPE)
    settings = {
        "data": str(material / "images"),
        "checkpoint": material / "bundle",
        "out": out,
        "epochs": 4,
        "scheme": str(material / "mine.yaml"),
        "calibration_images": 8,
        "batch_size": 8,
        "micro_batch": 4,
        "crop_padding": 4,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "drop_path": 0.2,
        "soft_mask": "linear",
        "soft_mask_epochs": 2,
        "ema_decay": 0.5,
        "checkpoint_steps": 2,
        "workers": 0,
    }
    return replace(options, **{**settings, **more})


def _run(options, job=None):
    options.out.mkdir(exist_ok=True)
    return start_run(job or open_job(options), ALONE)


def _write(job, run):
    return write_qat_bundle(job, run, lambda path: OnnxRuntimeEngine(path).infer, paired_drop)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_interrupted_and_resumed_gives_the_same_weights(autocast, material, tmp_path):
    """Weights, scales, optimiser state and moving average are restored to the bit."""
    whole = _run(_options(material, tmp_path / "whole", autocast=autocast))
    fit(whole)
    broken = _run(_options(material, tmp_path / "parts", autocast=autocast))
    learn, calls = broken.task.loss, iter(range(9))  # two micro-batches a step

    def until_killed(*arguments):
        if next(calls, None) is None:
            raise _KilledError
        return learn(*arguments)

    broken.task = replace(broken.task, loss=until_killed)
    with pytest.raises(_KilledError):
        fit(broken)
    resumed = _run(_options(material, tmp_path / "parts", autocast=autocast))
    assert resumed.progress.step == 4
    fit(resumed)
    assert resumed.progress.step == whole.progress.step == 8
    for one, other in ((whole.model, resumed.model), (whole.kept, resumed.kept)):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_is_not_mixed_with_another_scheme_s(material, tmp_path):
    """Also not with a changed scheme of the same name."""
    options = _options(material, tmp_path / "out", epochs=1)
    fit(_run(options))
    job = open_job(options)
    spec = TensorSpec("int8", calibrator="mse")
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "mine.yaml"
    write_scheme(replace(job.plan.scheme, tensors={**job.plan.scheme.tensors, "*.fc2.input": spec}), other)
    with pytest.raises(UserError, match="out"):
        _run(replace(options, scheme=str(other)))


def test_training_reduces_the_distance_to_the_float_network(material, tmp_path):
    """4-bit weights, 24 noise images: the distillation loss falls below that of the calibrated network."""
    activations = "'*.input': int8, '*.core.[qkv]': int8, '*.core.p': uint8, '*patch*.input': float"
    (tmp_path / "w4.yaml").write_text(
        f"base: w4a4\nreconstruction_iterations: 0\nrotate: {{}}\ntensors: {{{activations}}}\n"
    )
    options = _options(
        material,
        tmp_path / "out",
        epochs=40,
        drop_path=0.0,
        mixup_probability=0.0,
        rand_augment="",
        learning_rate=1e-4,
        soft_mask="none",
        checkpoint_steps=1000,
        scheme=str(tmp_path / "w4.yaml"),
    )
    run = _run(options)
    images = torch.cat(open_job(options).inputs.calibration)

    def loss():
        with torch.no_grad():
            return float(run.task.loss(images, run.model.eval()(images), torch.zeros(len(images), 3)))

    before = loss()
    start = {name: quantizer.scale.detach().clone() for name, quantizer in quantizers(run.model)}
    fit(run)
    assert loss() < 0.7 * before
    changed = [not torch.equal(quantizer.scale, start[name]) for name, quantizer in quantizers(run.model)]
    assert all(changed)


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """A bundle of the command, and its run."""
    options = _options(material, tmp_path_factory.mktemp("finished"), epochs=1)
    job = open_job(options)
    run = _run(options, job)
    fit(run)
    return _write(job, run), run


def _run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


def test_the_bundle_holds_what_was_trained(finished, images, network):
    folder, run = finished
    assert folder.name == "mine-qat"
    trained = copy.deepcopy(run.kept).eval()
    trained.soft_mask = 0.0
    logits = trained(images).detach()
    model, scheme = read_quantized_weights(folder / WEIGHTS, network)
    assert scheme.name == "mine" and any(getattr(q, "zero_point", 0) for _, q in quantizers(model))
    torch.testing.assert_close(model(images).detach(), logits, rtol=0, atol=1e-5)
    assert (logits - network(images)).abs().max() > 1e-3
    found = _run_onnx(folder / CPU_ONNX, images)
    np.testing.assert_allclose(found, logits.numpy(), rtol=0, atol=1e-4)
    assert not (folder / FUSED_ONNX).exists()  # TensorRT has no 4-bit activations
    assert read_scheme(folder / "scheme.yaml") == scheme
    with pytest.raises(UserError, match=WEIGHTS):
        load_checkpoint(folder)


def test_the_manifest_has_the_drops(finished, material):
    folder, _ = finished
    manifest = Manifest.read(folder)
    scores = manifest.scores
    assert scores.images == 18 and manifest.quantization.scheme == "mine" and scores.machine["cores"]
    for name in ("ptq", "qat", "onnx"):
        drop = scores.drops[name]
        assert drop.low <= drop.points <= drop.high
        assert drop.points == pytest.approx(scores.values["fp32"] - scores.values[name])
    assert {str(material / "bundle" / WEIGHTS), str(material / "mine.yaml")} <= manifest.provenance.inputs.keys()
    assert manifest.config == SMALL.to_dict() and manifest.preprocessing.size == (32, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distillation": 2.0}, "--distillation"),
        ({"temperature": 0.0}, "--temperature"),
        ({"calibration_images": 0}, "--calibration-images"),
        ({"scale_rate": -1.0}, "--scale-rate"),
        ({"scheme": "int3"}, "w4a4"),
        ({"data": ""}, "--data"),
        ({"data": "fashion-mnist"}, "classes"),
        ({"calibration_images": 25}, "images"),
    ],
)
def test_invalid_options_are_refused(change, words, material, tmp_path):
    with pytest.raises(UserError, match=words):
        _run(_options(material, tmp_path / "out", **change))


def test_the_debugger_reads_what_was_trained(finished, tmp_path, capsys):
    """It does not calibrate again, and refuses another checkpoint."""
    folder, _ = finished
    debug_layers.main(debug_layers.DebugOptions(folder, images=4))
    assert "<-" not in capsys.readouterr().out
    other = write_bundle(tmp_path / "other", SMALL)
    with pytest.raises(UserError, match="--checkpoint"):
        debug_layers.main(debug_layers.DebugOptions(folder, checkpoint=other, images=4))


def test_torchao_trains_with_its_own_fake_quantization(material, images, tmp_path):
    """The exported network computes what the trained one does."""
    job = open_job(_options(material, tmp_path, epochs=1, scheme="int8-dynamic", mixup_probability=0))
    run = _run(job.options, job)
    start = copy.deepcopy(run.model.state_dict())
    fit(run)
    assert any(not torch.equal(value, start[name]) for name, value in run.model.state_dict().items())
    folder = _write(job, run)
    top1 = Manifest.read(folder).scores.values
    assert top1["torchao"] == pytest.approx(top1["qat"]) and not (folder / CPU_ONNX).exists()
    trained = copy.deepcopy(run.kept).eval()
    trained.soft_mask = 0.0
    torch.testing.assert_close(load_torchao(folder)(images), trained(images), atol=1e-3, rtol=1e-2)


def test_damaged_weights_are_refused(finished, network, tmp_path):
    folder, _ = finished
    content = (folder / WEIGHTS).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[:-100])
    for path in (tmp_path / "short.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(UserError):
            read_quantized_weights(path, network)


def _arguments(material, out, *more):
    return [
        "quant/qat.py",
        "--checkpoint",
        material / "bundle",
        "--data",
        material / "images",
        "--out",
        out,
        "--scheme",
        "int8",
        "--epochs",
        1,
        "--batch-size",
        8,
        "--micro-batch",
        4,
        "--autocast",
        "float32",
        "--calibration-images",
        8,
        "--workers",
        0,
        *more,
    ]


def test_two_processes_train_as_one_by_the_command(material, tmp_path):
    """Gradients are averaged over the processes, those of scales too."""
    parts = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    rates = {"learning_rate": 1e-3, "scale_rate": 30.0, "ema_decay": 0.0}  # so that a few steps move scales visibly
    given = [text for name, value in rates.items() for text in (f"--{name.replace('_', '-')}", value)]
    result = run_command(*parts, *_arguments(material, tmp_path / "two", *given))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("bundle in") == 1
    manifest = Manifest.read(tmp_path / "two" / "int8-qat")
    assert ("class order" in result.stdout) == (manifest.scores.values["fp32"] < 40)  # a tenth from a third to all
    options = _options(
        material,
        tmp_path / "one",
        scheme="int8",
        epochs=1,
        autocast="float32",
        drop_path=0.0,
        rand_augment="",
        soft_mask="none",
        crop_padding=2,
        **rates,
    )
    fit(alone := _run(options, job := open_job(options)))
    make_scales_buffers(alone.kept)
    assert (tmp_path / "two" / "int8-qat" / FUSED_ONNX).exists()
    together, _ = read_quantized_weights(tmp_path / "two" / "int8-qat" / WEIGHTS, job.inputs.model)
    states = alone.kept.state_dict(), together.state_dict()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)
    before = dict(quantizers(job.untrained))
    changed = [float((q.scale / before[name].scale - 1).abs().max()) for name, q in quantizers(alone.kept)]
    assert min(changed) > 0.01  # ten times the tolerance


def test_a_mistake_is_one_line(material, tmp_path, run_here):
    assert_one_line_error(run_here(*_arguments(material, tmp_path / "out", "--scheme", "int3")), "int3", "w4a4")


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("small_dinov3", "int8-attention"), ("small_vit_registers", "w4a4"), ("small_vit_plain", "int8-dynamic")],
)
def test_a_timm_network_is_trained_exported_and_opened_again(name, scheme, tmp_path, image_folder, run_here):
    classes = len(list((image_folder / "train").iterdir()))
    _, path = saved(tmp_path, name, num_classes=classes)
    result = run_here(
        "quant/qat.py", "--model", f"timm:{name}", "--checkpoint", path, "--data", image_folder, "--scheme", scheme,
        "--epochs", 1, "--batch-size", 8, "--micro-batch", 8, "--workers", 0, "--calibration-images", 4,
        "--drop-path", 0.1, "--crop-padding", 0, "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    bundle = tmp_path / "out" / f"{scheme}-qat"
    scores = Manifest.read(bundle).scores
    assert scores.values.keys() > {"fp32", "ptq", "qat"}
    if scheme != "int8-dynamic":
        again = run_here("quant/debug_layers.py", bundle)
        assert again.returncode == 0 and "No mismatch" in again.stdout, again.stdout + again.stderr


def test_stochastic_depth_of_a_timm_network_rises():
    network = to_quantizable(VisionTransformer(**{**SMALL_VIT, "depth": 3}, block_fn=ParallelThingsBlock))
    blocks = with_dropout(network, 0.2, 0.0).vit.blocks
    rates = [[each.drop_prob for each in block.modules() if isinstance(each, DropPath)] for block in blocks]
    assert rates == [[], [0.1] * len(rates[1]), [0.2] * len(rates[1])] and rates[1]
    with pytest.raises(UserError, match="--dropout"):
        with_dropout(network, 0.0, 0.1)
