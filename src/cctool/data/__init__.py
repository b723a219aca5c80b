"""Data sets and the table that names them."""
