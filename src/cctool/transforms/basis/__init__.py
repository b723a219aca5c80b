"""Layers of basis functions with learned frequencies, real and complex."""
