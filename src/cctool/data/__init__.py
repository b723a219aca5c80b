"""Data sets and the table of their names."""
