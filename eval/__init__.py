"""Accuracy, latency, metrics and the report."""
