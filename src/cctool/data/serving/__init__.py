"""Batches of normalised, augmented and converted images."""
