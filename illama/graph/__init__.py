"""Reading, running and timing ONNX files."""
