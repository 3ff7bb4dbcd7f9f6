"""Predicted cost and latency of a network."""
