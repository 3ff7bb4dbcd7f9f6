"""Scores and their separation, against counted pairs, torchmetrics and torch, and on image files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import assert_one_line_error, write_linear_bundle
from torchmetrics.functional.classification import binary_auroc

from eval.metrics.separation import familiarity, measure_separation, separation
from illama.data.image_folders import Pictures

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=40)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auroc_is_the_share_of_pairs_in_order(inside, outside):
    pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    measured = separation(np.array(inside, float), np.array(outside, float))
    assert measured.auroc == pytest.approx(np.mean(pairs))
    accepted = min(t for t in sorted(set(inside)) if t >= _threshold(inside))
    assert measured.fpr_at_95 == pytest.approx(np.mean([b >= accepted for b in outside]))
    mirror = separation(-np.array(inside, float), -np.array(outside, float))
    assert measured.auroc + mirror.auroc == pytest.approx(1)


def _threshold(inside):
    """Returns the highest threshold that accepts 95% of the images from inside."""
    return max(t for t in inside if np.mean([a >= t for a in inside]) >= 0.95)


def test_auroc_is_torchmetrics_and_the_scores_are_torch_s():
    generator = np.random.default_rng(0)
    inside, outside = generator.normal(1, 2, (700, 10)), generator.normal(0, 1, (500, 10))
    scores, tensor = familiarity(inside), torch.from_numpy(inside)
    np.testing.assert_allclose(scores["energy"], tensor.logsumexp(1))
    np.testing.assert_allclose(scores["max probability"], tensor.softmax(1).amax(1))
    np.testing.assert_allclose(scores["max logit"], tensor.amax(1))
    results = measure_separation(inside, outside)
    for name, values in scores.items():
        both = np.concatenate([values, familiarity(outside)[name]])
        truth = torch.cat([torch.ones(700), torch.zeros(500)]).long()
        # torchmetrics applies a sigmoid to scores outside [0, 1], which keeps their order.
        expected = binary_auroc(torch.from_numpy(both / 100), truth)
        assert results[name].auroc == pytest.approx(float(expected), abs=1e-6)
        assert 0.5 < results[name].auroc < 1 and 0 < results[name].fpr_at_95 < 1


def test_large_logits_do_not_overflow():
    scores = familiarity(np.array([[5000.0, 0.0], [-5000.0, -5000.0]], np.float32))
    assert np.isfinite(list(scores.values())).all() and scores["energy"][0] == 5000


def test_what_cannot_be_separated_is_refused():
    for inside, outside in (([], [1.0]), ([1.0], []), ([np.nan], [1.0])):
        with pytest.raises(ValueError, match="finite"):
            separation(np.array(inside), np.array(outside))


def test_the_command_tells_the_bright_from_the_dark(image_folder, tmp_path, run_here):
    """Noise inside has logits near 0; white pictures outside have large logits, black pictures small ones."""
    classes = ["class0", "class1", "class2"]
    bundle = write_linear_bundle(tmp_path / "bundle", np.tile([[0.01, 0.02, 0.03]], (3 * 16 * 16, 1)), 16, classes)
    outside = tmp_path / "outside" / "deep"
    outside.mkdir(parents=True)
    Image.new("RGB", (20, 30), "white").save(outside / "a.png")
    Image.new("L", (30, 20), 255).save(outside / "b.JPG")
    (outside / "notes.txt").write_text("no picture")
    assert len(Pictures(tmp_path / "outside")) == 2
    command = ["eval/out_of_distribution.py", bundle, "--outside", outside, "--data", image_folder]
    result = run_here(*command, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "| bundle | 0.0000 | 100.0% | 0.0000 | 100.0% |" in result.stdout
    for picture in outside.glob("[ab].*"):
        Image.new("RGB", (20, 30)).save(picture)
    result = run_here(*command, "--out", tmp_path / "out")
    assert result.stdout.strip().splitlines()[-1].split(" | ")[3:5] == ["1.0000", "0.0%"]  # by the largest logit
    figures = json.loads((tmp_path / "out" / "out-of-distribution.json").read_text())
    assert figures["models"]["bundle"]["max logit"] == {"auroc": 1.0, "fpr_at_95": 0.0}
    (tmp_path / "empty").mkdir()
    for outside in (tmp_path / "empty", tmp_path / "nowhere"):
        wrong = run_here("eval/out_of_distribution.py", bundle, "--outside", outside, "--data", image_folder)
        assert_one_line_error(wrong, str(outside))
