"""MACs against torch's counter on the real network, and against the paper's formulas and table."""

import json

import pytest
import torch
from support import assert_one_line_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.cost_model.macs import count_macs, paper_attention_macs, preset_named, visible_pairs
from illama import ILLaMA, ModelConfig
from illama.models.config import VARIANTS

SMALL = {"image_size": 32, "patch_size": 8, "width": 64, "depth": 2, "heads": 2, "num_classes": 3}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize("readout_only", [True, False])
def test_the_count_is_torch_s_on_the_real_network(variant, form, readout_only):
    config = ModelConfig(**{**SMALL, **VARIANTS[variant]})
    model = ILLaMA(config).eval()
    model.readout_only = readout_only
    model.set_attention_form(form)
    # torch's counter does not count the CPU's fused attention kernel, so the same products run as plain ones.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, 32, 32))
    assert 2 * count_macs(config, form, readout_only).total == counter.get_total_flops()


@pytest.mark.parametrize("mask", ["post_softmax", "pre_softmax", "bidirectional"])
def test_tiny_at_full_size_under_every_mask(mask):
    config = ModelConfig.preset("tiny", mask=mask)
    with torch.device("meta"):
        model, images = ILLaMA(config).eval(), torch.empty(1, 3, 224, 224)
    model.set_attention_form("plain")
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert 2 * count_macs(config, "plain", readout_only=True).total == counter.get_total_flops()


@pytest.mark.parametrize("size", ["nano", "tiny", "base", "base@384", "large"])
def test_the_papers_formulas(size):
    """Bidirectional exactly; causal except for floor(N^2/2) + 1, where the triangle has N (N + 1) / 2 elements."""
    for mask, form, causal in (("bidirectional", "plain", False), ("post_softmax", "needed", True)):
        config = preset_named(size, mask)
        macs, n = count_macs(config, form, readout_only=False), config.tokens
        gap = n * (n + 1) // 2 - (n**2 // 2 + 1) if causal else 0
        paper = config.depth * (paper_attention_macs(n, config.width, causal) + gap * config.width)
        assert macs.projections + macs.products == paper
        assert gap * config.width * config.depth < 0.02 * paper


@pytest.mark.parametrize(
    ("size", "paper"),
    [("tiny", 1.3), ("small", 4.6), ("base", 17.6), ("base@384", 55.5), ("large", 62.8), ("large@384", 194.7)],
)
def test_the_paper_s_table_of_macs(size, paper):
    """To its last digit, if all scores and values are counted, masked or not."""
    assert round(count_macs(preset_named(size), "plain").total / 1e9, 1) == paper


def test_what_the_mask_lets_through_is_what_the_network_s_mask_holds():
    for changes in ({}, {"class_token": "first"}, {"class_token": "first", "class_sees_all": True}):
        config = ModelConfig(**{**SMALL, **changes})
        assert visible_pairs(config) == ILLaMA(config).causal.sum()


def test_the_command_prints_the_presets(run_here, tmp_path):
    result = run_here("eval/flops.py", "--sizes", "tiny", "base@384", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith(("| tiny", "| base@384"))]
    assert json.loads((tmp_path / "flops.json").read_text())["macs"]["tiny"]["post, plain"]["head"] == 192 * 1000
    assert len(rows) == 2 and "| 197 | 1.254 (0.527) |" in rows[0] and "| 577 | 55.484 (22.472) |" in rows[1]
    assert_one_line_error(run_here("eval/flops.py", "--sizes", "huge"), "huge")
    assert_one_line_error(run_here("eval/flops.py", "--sizes", "tiny@large"), "tiny@large")
