"""Quantized networks as plain arithmetic for exports."""
