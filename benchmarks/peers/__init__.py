"""The quantizers that :mod:`quant_peers` compares."""
