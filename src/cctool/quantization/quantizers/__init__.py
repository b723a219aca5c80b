"""Quantizers that act in forward passes: uniform, DoReFa, WRPN, LSQ, PACT."""
