"""Architectures and the table that names them."""
