"""Architectures and the tables of their names."""
