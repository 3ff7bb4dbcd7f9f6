"""ONNX graphs and bundles of quantized networks, and their comparison with PyTorch."""
