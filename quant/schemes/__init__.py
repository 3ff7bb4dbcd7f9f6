"""Quantization schemes: number formats, and the shipped schemes as YAML files."""
