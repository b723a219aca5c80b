"""Verdicts on written files: both programs are run, and what rounding does is told from faults."""
