"""Masks of weights: which elements go, and what masks left empty."""
