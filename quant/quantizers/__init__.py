"""Calibration, quantized layers, SmoothQuant, block reconstruction, QAT and torchao."""
