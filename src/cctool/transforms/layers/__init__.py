"""Layers whose weights are stored as coefficients or factors."""
