"""TensorRT engines, one interface to all runtimes, graph rewrites, and serving."""
