"""Model repositories for Triton Inference Server, and the server."""
