"""The quantizers that :mod:`quant_peers` compares with each other."""
