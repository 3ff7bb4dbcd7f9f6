"""Training: the schedules, and that a killed run ends with the weights of one that was not."""

import gzip
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_command
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from illama import ILLaMA, ModelConfig
from illama.data import SHIPPED_FASHION_MNIST, read_idx
from illama.schedules import cosine_with_warmup, soft_mask_alpha
from illama.train import ShuffledBatches, parameter_groups, read_log


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


@given(images=st.integers(4, 60), start=st.integers(0, 20))
def test_a_resumed_sampler_goes_on_where_the_first_stopped(images, start):
    whole = list(ShuffledBatches(images, 4, seed=1, start=0, stop=20))
    assert list(ShuffledBatches(images, 4, seed=1, start=start, stop=20)) == whole[start:]
    per_epoch = images // 4
    first = [index for batch in whole[:per_epoch] for _, index in batch]
    assert len(set(first)) == len(first)


def test_weight_decay_spares_norms_biases_and_tables():
    model = ILLaMA(ModelConfig.preset("nano"))
    decayed, spared = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.05))
    names = {name: id(p) for name, p in model.named_parameters()}
    assert {name for name, key in names.items() if key in decayed} == {
        name for name in names if name.endswith("weight") and "norm" not in name
    }
    assert len(decayed) + len(spared) == len(names)


@pytest.fixture
def training_folder(tmp_path):
    """Fashion-MNIST's layout with 330 real images, so that an epoch is a few steps."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for kind in ("images-idx3", "labels-idx1"):
        array = read_idx(SHIPPED_FASHION_MNIST / f"calibration-{kind}-ubyte.gz")[:330]
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def _arguments(data, out, *more):
    return ["illama/train.py", "--data", f"fashion-mnist:{data}", "--out", out, "--epochs", 3, "--batch-size", 64,
            "--checkpoint-steps", 2, "--ema-decay", 0.5, "--soft-mask-epochs", 1, *more]  # fmt: skip


def _kill_after_a_checkpoint(arguments, checkpoint):
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               start_new_session=True)  # fmt: skip
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_and_resumed_gives_the_same_weights(training_folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_command(*_arguments(training_folder, whole)).returncode == 0
    _kill_after_a_checkpoint(_arguments(training_folder, killed), killed / "checkpoint.pt")
    step = torch.load(killed / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 12
    assert not (killed / "bundle").exists()
    resumed = run_command(*_arguments(training_folder, killed))
    assert resumed.returncode == 0, resumed.stderr
    one, other = (load_file(out / "bundle" / "model.safetensors") for out in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [read_log(out / "log.csv") for out in (whole, killed)]
    assert [row["train_loss"] for row in rows[0]] == [row["train_loss"] for row in rows[1]]
    assert len(rows[1]) == 3
    assert list((killed / "tensorboard").iterdir())
    assert (killed / "bundle" / "curve.png").stat().st_size > 1000

    with_file = run_command(*_arguments(training_folder, training_folder / "train-images-idx3-ubyte.gz"))
    assert_one_line_error(with_file, "cannot write")
    other_options = run_command(*_arguments(training_folder, killed, "--seed", 1))
    assert_one_line_error(other_options, "other options")
    shutil.rmtree(killed / "bundle")
    (killed / "checkpoint.pt").write_bytes((killed / "checkpoint.pt").read_bytes()[:1000])
    assert_one_line_error(run_command(*_arguments(training_folder, killed)), "damaged")


@pytest.mark.parametrize(
    ("option", "words"),
    [(("--batch-size", 63), "even"), (("--epochs", 0), "at least 1"), (("--ema-decay", 2), "0..1"),
     (("--batch-size", 512), "fewer than one batch")],
)  # fmt: skip
def test_options_that_cannot_be(option, words, training_folder, tmp_path):
    assert_one_line_error(run_command(*_arguments(training_folder, tmp_path / "out", *option)), words)


def test_a_broken_training_image_is_one_line(image_folder, tmp_path):
    """The error crosses from a data loader's worker process."""
    (image_folder / "train" / "class1" / "3.png").write_bytes(b"no picture")
    result = run_command("illama/train.py", "--data", image_folder, "--out", tmp_path / "out", "--batch-size", 4,
                         "--in-channels", 3, "--epochs", 2)  # fmt: skip
    assert_one_line_error(result, "class1/3.png")


def test_training_learns(training_folder, tmp_path):
    """Ten epochs over 297 images: the loss falls well below what guessing gives, log 10."""
    result = run_command(*_arguments(training_folder, tmp_path / "out", "--epochs", 10, "--warmup-epochs", 1,
                                     "--mixup-probability", 0, "--label-smoothing", 0, "--erasing", 0))  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = [float(row["train_loss"]) for row in read_log(tmp_path / "out" / "log.csv")]
    assert losses[-1] < 1.5 < losses[0]
    assert "top-1" in result.stdout
