"""Compress trained CNNs: every command reads a checkpoint, does one thing and writes a checkpoint."""

__version__ = "0.1.0"
