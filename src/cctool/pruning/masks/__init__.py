"""Masks of weights: which elements they remove, and which units are empty then."""
