"""Calibration error, likelihood, Brier score and temperature, against torchmetrics, torch and known answers."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from eval.metrics.calibration import calibration_error, equal_mass_bins, equal_width_bins, fit_temperature, reliability
from eval.metrics.predictions import Predictions


def _overconfident(images, classes=10, temperature=2.5, seed=0):
    """Labels drawn from softmax(z), and logits z times the temperature: the right temperature is known."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(images, classes, generator=generator, dtype=torch.float64) * 2
    labels = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
    return (true * temperature).numpy(), labels.numpy()


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_is_torchmetrics(bins):
    logits, labels = _overconfident(3000)
    expected = multiclass_calibration_error(torch.from_numpy(logits), torch.from_numpy(labels), 10, n_bins=bins)
    assert reliability(Predictions.of(logits, labels), bins).ece == pytest.approx(float(expected), abs=1e-6)


def test_nll_and_brier_are_torch_s():
    logits, labels = _overconfident(500)
    measured, tensor = reliability(Predictions.of(logits, labels)), torch.from_numpy(logits)
    assert measured.nll == pytest.approx(F.cross_entropy(tensor, torch.from_numpy(labels)).item())
    one_hot = F.one_hot(torch.from_numpy(labels), 10)
    assert measured.brier == pytest.approx((tensor.softmax(1) - one_hot).square().sum(1).mean().item())
    far = reliability(Predictions.of(np.array([[0.0, 2000.0]], np.float32), np.array([0])))
    assert far.nll == 2000 and far.brier == 2 and far.ece == 1


def test_adaptive_ece_by_hand_in_fractions():
    confidence = [Fraction(i, 40) for i in range(10, 40, 2)]
    right = [i % 3 != 0 for i in range(15)]
    groups = [(0, 4), (4, 8), (8, 12), (12, 15)]  # four bins of 15 images
    expected = sum(abs(sum(confidence[a:b]) - sum(right[a:b])) for a, b in groups) / 15
    shuffled = np.random.default_rng(0).permutation(15)
    bins = equal_mass_bins(np.array([float(c) for c in confidence])[shuffled], np.array(right)[shuffled], 4)
    assert [each.count for each in bins] == [4, 4, 4, 3]
    assert calibration_error(bins) == pytest.approx(float(expected))


def test_the_diagram_sorts_edges_downward_as_the_paper_does():
    bins = equal_width_bins(np.array([0.2, 0.21, 0.4, 1.0]), np.array([True, False, False, True]), 5)
    assert [(round(each.low, 9), each.count, each.accuracy) for each in bins] == [(0, 1, 1), (0.2, 2, 0), (0.8, 1, 1)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_either_binning_keeps_every_image_and_bounds_the_plain_gap(images, bins):
    confidence, right = np.array([c for c, _ in images]), np.array([r for _, r in images])
    for parts in (equal_width_bins(confidence, right, bins), equal_mass_bins(confidence, right, bins)):
        assert sum(each.count for each in parts) == len(images)
        assert sum(each.count * each.confidence for each in parts) == pytest.approx(confidence.sum())
        assert abs(confidence.mean() - right.mean()) - 1e-9 <= calibration_error(parts) <= 1


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_is_that_of_torch_s_lbfgs_and_near_the_true_one(temperature):
    logits, labels = _overconfident(8000, temperature=temperature)
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [inverse], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.from_numpy(logits) * inverse, torch.from_numpy(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(1 / inverse.item(), rel=1e-5)
    assert fitted == pytest.approx(temperature, rel=0.05)


def test_scaling_mends_what_it_was_not_fitted_on():
    temperature = fit_temperature(*_overconfident(4000, seed=1))
    logits, labels = _overconfident(20_000)
    before, after = (reliability(Predictions.of(logits, labels, each)) for each in (1, temperature))
    assert before.ece > 0.1 and after.ece < 0.02
    assert after.nll < before.nll and after.brier < before.brier


def test_what_has_no_answer_is_refused():
    logits, labels = _overconfident(50)
    with pytest.raises(ValueError, match="temperature"):
        fit_temperature(logits, logits.argmax(1))
    with pytest.raises(ValueError, match="temperature"):
        fit_temperature(20 * np.eye(4), np.arange(4))
    with pytest.raises(ValueError, match="0"):
        reliability(Predictions.of(logits, labels), 0)
    with pytest.raises(ValueError, match=r"\(0, 10\)"):
        fit_temperature(logits[:0], labels[:0])
