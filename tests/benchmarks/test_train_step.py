"""benchmarks/train_step.py: both networks compute the same function, and the command runs."""

import json
import runpy

import pytest
import torch
from support import ROOT, assert_one_line_error, run_command

from illama import ModelConfig
from illama.models.attention import AttentionMask, fastest_form

BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "train_step.py"))
Released, compare = BENCHMARK["Released"], BENCHMARK["compare"]
CONFIG = ModelConfig(image_size=32, patch_size=8, width=64, depth=3, heads=2, num_classes=5)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_reference_computes_as_the_released_code(parity, alpha):
    reference = Released(parity.config)
    reference.load_state_dict(parity.state)
    reference.soft_mask = alpha
    with torch.no_grad():
        assert (reference(parity.input) - parity.tensors[f"logits.alpha_{alpha}"]).abs().max() < 1e-5


def test_both_networks_have_the_same_loss_and_gradients():
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    assert compare(CONFIG, images, labels, (0.0, 0.5, 1.0)) < 1e-4


def _see_everything(_, inputs):
    q, k, v, mask, *rest = inputs
    return (q, k, v, AttentionMask("bidirectional", mask.causal), *rest)


def test_the_comparison_notices_another_mask(monkeypatch):
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    networks = BENCHMARK["make_networks"](CONFIG, "cpu")
    networks["ours"].blocks[0].attn.core.register_forward_pre_hook(_see_everything)
    monkeypatch.setitem(compare.__globals__, "make_networks", lambda *_: networks)
    with pytest.raises(AssertionError, match="alpha 0"):
        compare(CONFIG, images, labels, (0.0,))


def test_the_command_writes_what_it_prints(tmp_path):
    result = run_command(
        "benchmarks/train_step.py",
        "--size",
        "nano",
        "--batch",
        "2",
        "--rounds",
        "2",
        "--no-compile",
        "--threads",
        "1",
        "--out",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "train-step.json").read_text())
    assert content["threads"] == 1 and content["gradient_deviation"] < 1e-4
    assert [(row["precision"], row["alpha"]) for row in content["results"]] == [
        (precision, alpha) for precision in ("float32", "bfloat16") for alpha in (0.0, 0.5, 1.0)
    ]
    for row in content["results"]:
        assert set(row["milliseconds"]) == {"ours", "released"} and set(row["speedup"]) == {"eager"}
        assert f"{row['speedup']['eager']['median']:.2f}  [" in result.stdout
        assert f"| {row['speedup']['eager']['median']:.2f} (" in (tmp_path / "train-step.md").read_text()
    assert_one_line_error(run_command("benchmarks/train_step.py", "--alphas", "2"), "alphas")


def test_a_cpu_trains_in_16_bits_with_the_plain_form():
    seen = torch.ones(3, 3, dtype=torch.bool)
    causal, open_mask = (AttentionMask(kind, seen.tril()) for kind in ("post_softmax", "bidirectional"))
    for dtype, trains, form in (
        (torch.float32, True, "fused"),
        (torch.bfloat16, True, "plain"),
        (torch.bfloat16, False, "fused"),
    ):
        queries = torch.zeros(1, 1, 3, 2, dtype=dtype, requires_grad=trains)
        assert fastest_form(queries, open_mask) == form
        assert fastest_form(queries, causal) == "plain"
