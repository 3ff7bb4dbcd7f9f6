"""Benchmark targets, their evaluation, latency and sensors."""
