"""Quantization: how weights are stored in fewer bits."""
