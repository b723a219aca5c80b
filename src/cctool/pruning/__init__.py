"""Structural pruning: scores, selection, surgery, masks and verification."""
