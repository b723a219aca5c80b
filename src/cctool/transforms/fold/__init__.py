"""Baking fixed transformations into weights: computed kernels, batch norm, parallel branches."""
