"""Accuracy drop, calibration, robustness and other metrics of predictions."""
