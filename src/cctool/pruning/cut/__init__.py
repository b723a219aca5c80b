"""Coupling, cutting and verifying."""
