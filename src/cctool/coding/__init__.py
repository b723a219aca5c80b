"""Bitstreams: sparse exponential-Golomb codes of integers."""
