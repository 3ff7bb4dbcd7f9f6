"""TensorRT and TensorRT-RTX: options, builder, fused attention, engine records."""
