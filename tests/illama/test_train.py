"""Training: recipes, schedules, and the same weights after a kill or with several processes."""

import gzip
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import ROOT, assert_one_line_error, run_command

from illama import ILLaMA, ModelConfig
from illama.bundle import SHIPPED
from illama.data.augmentation import Augmented, MicroBatches, training_transform
from illama.data.datasets import SHIPPED_FASHION_MNIST, open_data
from illama.data.idx_files import read_idx
from illama.errors import UserError
from illama.hardware import computes_bfloat16
from illama.manifest import TRAINED, Manifest
from illama.training.distributed import Processes
from illama.training.log import Log, read_log
from illama.training.recipe import Recipe, TrainingOptions, load_recipe, recipe_names
from illama.training.schedules import cosine_with_warmup, soft_mask_alpha
from illama.training.start import make_model
from illama.training.trainer import make_optimizer


@given(step=st.integers(0, 10_000), cutoff=st.integers(0, 5_000))
def test_soft_mask_schedules(step, cutoff):
    linear = soft_mask_alpha("linear", step, cutoff)
    assert 0 <= linear <= 1
    assert soft_mask_alpha("none", step, cutoff) == 0
    assert soft_mask_alpha("constant", step, cutoff) == float(step < cutoff)
    assert linear >= soft_mask_alpha("linear", step + 1, cutoff)
    assert (linear > 0) == (step < cutoff)
    if cutoff:
        assert soft_mask_alpha("linear", 0, cutoff) == 1


def test_cosine_with_warmup():
    rates = [cosine_with_warmup(step, 100, 10, 1.0, 0.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[9:] == sorted(rates[9:], reverse=True)


SETTINGS = Recipe(batch_size=8, micro_batch=2, seed=1)


@given(images=st.integers(8, 60), start=st.integers(0, 20), processes=st.sampled_from([1, 2, 4]))
def test_a_resumed_sampler_continues(images, start, processes):
    """With any number of processes, which together get the batches of one."""
    whole = list(MicroBatches(images, SETTINGS, 0, 20))
    assert list(MicroBatches(images, SETTINGS, start, 20)) == whole[4 * start :]
    shares = [list(MicroBatches(images, SETTINGS, 0, 20, rank, processes)) for rank in range(processes)]
    assert [part for step in zip(*shares, strict=True) for part in step] == whole
    per_epoch = images // 8 * 4
    first = [index for part in whole[:per_epoch] for _, index in part]
    assert len(set(first)) == len(first) == images // 8 * 8


def test_norms_biases_and_tables_have_no_weight_decay():
    for variant in ("illama", "vit"):
        model = ILLaMA(ModelConfig.preset("nano", variant))
        for layer_decay in (1.0, 0.5):
            groups = make_optimizer(Recipe(layer_decay=layer_decay, weight_decay=0.3), model).param_groups
            decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
            for name, p in model.named_parameters():
                matrix = name.endswith("weight") and "norm" not in name
                assert decay[id(p)] == (0.3 if matrix else 0.0), name


def test_layer_decay_lowers_the_rate_block_by_block():
    model = ILLaMA(ModelConfig.preset("nano"))
    groups = make_optimizer(Recipe(layer_decay=0.5), model).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    rates = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert rates["head.weight"] == 1
    assert rates["norm.weight"] == rates["blocks.5.mlp.fc2.weight"]  # timm's convention
    assert [rates[f"blocks.{i}.mlp.fc2.weight"] for i in range(6)] == [0.5 ** (6 - i) for i in range(6)]
    assert rates["cls_token"] == rates["pos_embed"] == rates["patch_embed.proj.weight"] == 0.5**7


PAPER = {  # arXiv 2404.06773: epochs, batch, learning rate, weight decay, warm-up, stochastic depth, mixup, mask
    "in1k-tiny": (300, 4096, 4e-3, 0.05, 5, 0, 0.1, 0.1, "constant", 50),
    "in1k-small": (300, 4096, 4e-3, 0.05, 5, 0.1, 0.5, 0.5, "linear", 50),
    "in1k-base": (300, 4096, 4e-3, 0.05, 50, 0.4, 0.95, 1.0, "linear", 25),
    "in21k-base": (90, 4096, 1e-3, 0.01, 5, 0.1, 0.8, 1.0, "constant", 30),
    "in21k-large": (90, 4096, 1e-3, 0.01, 5, 0.1, 0.8, 1.0, "constant", 30),
    "in1k-base-384": (30, 512, 8e-5, 1e-8, 0, 0.8, 0, 0, "constant", 0),
    "in21k-in1k-base-224": (30, 512, 8e-5, 1e-8, 0, 0.2, 0, 0, "constant", 0),
    "in21k-in1k-large-224": (30, 512, 6e-5, 1e-8, 0, 0.3, 0, 0, "constant", 0),
    "in21k-in1k-base-384": (30, 512, 1.1e-4, 1e-8, 0, 0.2, 0, 0, "constant", 0),
    "in21k-in1k-large-384": (30, 512, 3.5e-5, 1e-8, 0, 0.3, 0, 0, "constant", 0),
    "cifar10-tiny": (300, 1024, 2e-3, 0.05, 50, 0, 0.1, 0.1, "linear", 25),
    "cifar100-tiny": (300, 1024, 2e-3, 0.05, 50, 0, 0.1, 0.1, "linear", 50),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_equal_the_paper_s(name):
    recipe = load_recipe(name)
    schedule = (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay, recipe.warmup_epochs)
    regularization = (recipe.drop_path, recipe.mixup, recipe.cutmix, recipe.soft_mask, recipe.soft_mask_epochs)
    assert schedule + regularization == PAPER[name]
    assert (recipe.optimizer, recipe.erasing, recipe.label_smoothing) == ("adamw", 0.25, 0.1)
    assert (recipe.rand_augment, recipe.dropout, recipe.ema_decay) == ("rand-m9-mstd0.5-inc1", 0, 0)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_s_network_can_be_created(name):
    recipe = replace(load_recipe(name), new_head=False)  # without the weights that fine-tuning starts from
    if recipe.model in ("base", "large"):
        recipe = replace(recipe, depth=1)  # else it would draw hundreds of millions of random numbers
    model = make_model(recipe, 10)
    size = 384 if "384" in name else {"nano-fashion-mnist": 28, "nano-emoji": 28, "tiny-emoji": 32}.get(name, 224)
    patch = 4 if size < 224 else 16
    assert model.config.tokens == (size // patch) ** 2 + 1
    assert make_optimizer(recipe, model).param_groups


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("epochs: many", "mine.yaml.*epochs"),
        ("epoch: 3", "mine.yaml.*epoch: "),
        ("compile: 1", "mine.yaml.*compile"),
        ("soft_mask: soft", "soft_mask.*linear"),
        ("- 3", "mine.yaml"),
        ("epochs: [", "mine.yaml"),
        ("batch_size: 200", "--micro-batch"),
        ("dropout: 2", "mine.yaml.*dropout"),
        ("recipe: in1k-tiny", "mine.yaml.*recipe: "),
        ("learning_rate: .nan", "mine.yaml.*learning_rate"),
    ],
)
def test_wrong_recipes_are_rejected(text, identifier, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=identifier):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_numbers_in_a_recipe_get_the_type_of_the_option(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rate: 4e-3\nmixup: 1\nout: here\nimage_size: 32\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.learning_rate, recipe.mixup, recipe.out, recipe.image_size) == (4e-3, 1.0, Path("here"), 32)


@given(total=st.integers(1, 50), count=st.integers(1, 9))
def test_every_index_counts_for_one_process(total, count):
    shares = [Processes(rank, count, torch.device("cpu")).share(total) for rank in range(count)]
    counted = [index for own, number in shares for index in own[:number]]
    assert sorted(counted) == list(range(total))
    assert len({len(own) for own, _ in shares}) == 1


@pytest.mark.parametrize("rand_augment", ["", "rand-m9-mstd0.5-inc1"])
@pytest.mark.parametrize("padding", [0, 2])
def test_an_augmentation_depends_only_on_its_key_and_restores_the_generators(rand_augment, padding):
    data = open_data("fashion-mnist")
    recipe = Recipe(rand_augment=rand_augment, crop_padding=padding, erasing=1.0)
    images = data.calibration(10)
    transform = training_transform(recipe, data.preprocessing(28, 1))
    one, other = (Augmented(images, transform, seed) for seed in (3, 4))
    image, label = one[5, 7]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32 and label == images[7][1]
    torch.rand(3), random.random(), np.random.randn()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(one[5, 7][0], image)
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(states[0], after[0]) and str(states[1:]) == str(after[1:])
    for key, source in (((6, 7), one), ((5, 7), other)):
        assert not torch.equal(source[key][0], image)


@pytest.fixture
def training_folder(tmp_path):
    """A folder with 330 images of Fashion-MNIST, so that an epoch has few steps."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for kind in ("images-idx3", "labels-idx1"):
        array = read_idx(SHIPPED_FASHION_MNIST / f"calibration-{kind}-ubyte.gz")[:330]
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def _arguments(data, out, *more):
    return [
        "illama/train.py",
        "--data",
        f"fashion-mnist:{data}",
        "--out",
        out,
        "--epochs",
        3,
        "--batch-size",
        64,
        "--micro-batch",
        16,
        "--depth",
        2,
        "--width",
        32,
        "--checkpoint-steps",
        2,
        "--ema-decay",
        0.5,
        "--soft-mask-epochs",
        1,
        "--workers",
        0,
        *more,
    ]


def test_an_incomplete_row_is_dropped(tmp_path):
    for step in (0, 10):
        log = Log(tmp_path, step)
        log.write_loss(step + 10, 2.5)
        with (tmp_path / "losses.csv").open("a") as file:
            file.write("1")  # of step 12, after any checkpoint
    assert [row["step"] for row in read_log(tmp_path / "losses.csv")] == ["10", "20"]
    (tmp_path / "losses.csv").write_text("step,tra")
    assert read_log(tmp_path / "losses.csv") == []


def _torchrun(processes, *arguments):
    """Returns the arguments of torchrun with processes on the CPU."""
    return [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
        "--max-restarts",
        1,
        "--monitor-interval",
        0.1,
        *arguments,
    ]


@pytest.fixture
def own_store(monkeypatch):
    """Gives restarted workers a new store."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def _start(arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _wait_for(process, path):
    while process.poll() is None and not path.exists():
        time.sleep(0.01)


def _kill_after_a_checkpoint(arguments, checkpoint):
    """Kills a run with SIGKILL, up to half a second after the first checkpoint."""
    process = _start(arguments)
    _wait_for(process, checkpoint)
    time.sleep(random.uniform(0, 0.5))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def _losses(out, log="losses.csv"):
    return [float(row["train_loss"]) for row in read_log(out / log)]


def _weights(out):
    return load_file(out / "bundle" / "model.safetensors")


def _same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_killed_and_resumed_gives_the_same_weights(autocast, training_folder, tmp_path):
    """Data order, augmentation, dropout, stochastic depth, schedules, moving average and loss scale are resumed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--autocast", autocast, "--dropout", 0.1, "--drop-path", 0.2, "--epochs", 6)
    result = run_command(*_arguments(training_folder, whole, *more))
    assert result.returncode == 0, result.stderr
    _kill_after_a_checkpoint(_arguments(training_folder, killed, *more), killed / "checkpoint.pt")
    assert 0 < torch.load(killed / "checkpoint.pt", weights_only=True)["step"] < 24
    assert not (killed / "bundle").exists()
    resumed = run_command(*_arguments(training_folder, killed, *more))
    assert resumed.returncode == 0, resumed.stderr
    assert _same_bits(_weights(whole), _weights(killed))
    rows = [read_log(out / "log.csv") for out in (whole, killed)]
    assert [row["train_loss"] for row in rows[0]] == [row["train_loss"] for row in rows[1]]
    assert len(rows[1]) == 6
    assert _losses(whole) == _losses(killed)
    assert list((killed / "tensorboard").iterdir())
    assert (killed / "bundle" / "curve.png").stat().st_size > 1000


@pytest.fixture
def finished(training_folder, tmp_path):
    """A run of one process in float32, as the reference."""
    out = tmp_path / "finished"
    result = run_command(*_arguments(training_folder, out, "--autocast", "float32"))
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize("more", [(), ("--fsdp", "--checkpoint-steps", 100)], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one(more, finished, own_store, training_folder, tmp_path):
    """Float32 sums have another order, so losses agree to 1e-5."""
    out = tmp_path / "two"
    arguments = _arguments(training_folder, out, "--autocast", "float32", *more)
    result = run_command(*_torchrun(2, *arguments))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("top-1") == 1
    assert _losses(out, "log.csv") == pytest.approx(_losses(finished, "log.csv"), abs=1e-5)
    one, other = _weights(finished), _weights(out)
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4
    one, other = (Manifest.read(folder / "bundle").scores for folder in (finished, out))
    assert one.images == other.images == 10_000
    assert one.values[TRAINED] == pytest.approx(other.values[TRAINED], abs=0.02)


def test_sharded_training_without_an_average_is_resumed(own_store, training_folder, tmp_path):
    """Without a moving average, as in the recipes of Large; stopped after an epoch, and resumed by one process."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--autocast", "float32", "--ema-decay", 0)
    result = run_command(*_arguments(training_folder, whole, *more))
    assert result.returncode == 0, result.stderr
    process = _start(_torchrun(2, *_arguments(training_folder, parts, *more, "--fsdp")))
    _wait_for(process, parts / "checkpoint.pt")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    result = run_command(*_arguments(training_folder, parts, *more))
    assert result.returncode == 0, result.stderr
    assert _losses(parts) == pytest.approx(_losses(whole), abs=1e-5)


def test_a_restart_that_would_hang_is_rejected(training_folder, tmp_path):
    result = run_command(*_torchrun(1, *_arguments(training_folder, tmp_path / "out")))
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in result.stderr


def test_torchrun_restarts_a_killed_worker(finished, own_store, training_folder, tmp_path):
    out = tmp_path / "restarted"
    process = _start(_torchrun(2, *_arguments(training_folder, out, "--autocast", "float32")))
    _wait_for(process, out / "checkpoint.pt")  # of step 2 of 12
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert b"exitcode: -9" in errors
    assert _losses(out) == pytest.approx(_losses(finished), abs=1e-5)


def test_a_run_is_not_resumed_with_other_options(finished, training_folder, tmp_path, run_here):
    with_file = run_here(*_arguments(training_folder, training_folder / "train-images-idx3-ubyte.gz"))
    assert_one_line_error(with_file, "cannot write")
    same = ("--autocast", "float32")
    assert_one_line_error(run_here(*_arguments(training_folder, finished, *same, "--seed", 1)), "other options")
    for kind, size in (("labels-idx1", 8), ("images-idx3", 16)):  # thirty images fewer
        path = training_folder / f"train-{kind}-ubyte.gz"
        content = gzip.decompress(path.read_bytes())
        kept = size + 300 * (1 if size == 8 else 28 * 28)
        path.write_bytes(gzip.compress(content[:4] + (300).to_bytes(4, "big") + content[8:kept]))
    assert_one_line_error(run_here(*_arguments(training_folder, finished, *same)), "images")
    path = finished / "checkpoint.pt"
    for content in (path.read_bytes()[:1000], b"hello"):
        path.write_bytes(content)
        assert_one_line_error(run_here(*_arguments(training_folder, finished, *same)), "damaged")


def test_fine_tuning_starts_from_a_checkpoint_s_weights(training_folder, tmp_path):
    """After one step at a very low learning rate, the weights are the checkpoint's, and the head is new."""
    result = run_command(
        *_arguments(
            training_folder,
            tmp_path / "out",
            "--init",
            SHIPPED,
            "--new-head",
            "--epochs",
            1,
            "--depth",
            6,
            "--width",
            128,
            "--learning-rate",
            1e-7,
            "--ema-decay",
            0,
            "--mask",
            "post_softmax",
        )
    )
    assert result.returncode == 0, result.stderr
    before, after = load_file(SHIPPED / "model.safetensors"), _weights(tmp_path / "out")
    for name in before:
        difference = float((before[name] - after[name]).abs().max())
        assert (difference > 1e-3) == (name == "head.weight" or name == "head.bias"), name
    assert Manifest.read(tmp_path / "out" / "bundle").provenance.inputs
    other = run_command(*_arguments(training_folder, tmp_path / "other", "--init", SHIPPED))
    assert_one_line_error(other, "depth")


@pytest.mark.parametrize(
    ("option", "identifier"),
    [
        (("--micro-batch", 63), "even"),
        (("--epochs", 0), "--epochs"),
        (("--ema-decay", 2), "--ema-decay"),
        (("--batch-size", 512), "fewer than one batch"),
        (("--optimizer", "best"), "adamw"),
        (("--rand-augment", "much"), "rand-m9"),
        (("--recipe", "in2k"), "in1k-tiny"),
        (("--variant", "bert"), "vit"),
        (("--fsdp", "--autocast", "float16"), "bfloat16"),
        (("--fsdp",), "torchrun"),
        (("--learning-rate", 1e9), "not finite"),
        (("--in-channels", 2), "in_channels"),
        (("--width", 0), "width"),
        (("--new-head",), "--init"),
        (("--optimizer", "fusedadam"), "adamw"),
        (("--init", "/etc/passwd"), "not a checkpoint"),
    ],
)
def test_wrong_options_are_rejected(option, identifier, training_folder, tmp_path, run_here):
    assert_one_line_error(run_here(*_arguments(training_folder, tmp_path / "out", *option)), identifier)


def test_the_error_for_a_broken_training_image_is_one_line(image_folder, tmp_path):
    """The error comes from a data loader's worker."""
    (image_folder / "train" / "class1" / "3.png").write_bytes(b"no picture")
    result = run_command(
        "illama/train.py",
        "--data",
        image_folder,
        "--out",
        tmp_path / "out",
        "--batch-size",
        4,
        "--in-channels",
        3,
        "--epochs",
        2,
        "--workers",
        2,
    )
    assert_one_line_error(result, "class1/3.png")


def test_training_learns(training_folder, tmp_path):
    """After twenty epochs of 297 images, the loss is well below that of guessing, log 10."""
    plain = ("--mixup-probability", 0, "--label-smoothing", 0, "--erasing", 0, "--soft-mask", "none")
    result = run_command(
        *_arguments(
            training_folder,
            tmp_path / "out",
            "--epochs",
            20,
            "--warmup-epochs",
            1,
            "--width",
            64,
            "--learning-rate",
            5e-3,
            *plain,
        )
    )
    assert result.returncode == 0, result.stderr
    losses = _losses(tmp_path / "out", "log.csv")
    assert losses[-1] < 1.5 < losses[0]
    assert "top-1" in result.stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2 fma", "float32"), ("avx2 avx512_bf16", "bfloat16"), ("amx_bf16 amx_int8", "bfloat16")],
)
def test_bfloat16_is_the_default_where_it_is_computed(flags, expected, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text(f"flags : fpu {flags}\n")
    monkeypatch.setattr("illama.training.recipe.computes_bfloat16", lambda: computes_bfloat16(info))
    assert TrainingOptions().dtype_on("cpu") == expected and TrainingOptions().dtype_on("cuda") == "bfloat16"
    assert TrainingOptions(autocast="float16").dtype_on("cpu") == "float16"
    assert not computes_bfloat16(tmp_path / "none")
