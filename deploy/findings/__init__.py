"""What keeps an ONNX file from loading, from being accurate or from being fast, found without running it."""
