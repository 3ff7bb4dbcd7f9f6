"""Schemes, calibration, quantized layers and the export to ONNX."""
