"""Batches of normalised, varied and converted images."""
