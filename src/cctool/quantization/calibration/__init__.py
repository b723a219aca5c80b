"""Ranges of activations and weights, from images and values."""
