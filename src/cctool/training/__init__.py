"""Fitting and evaluating: loops, losses, metrics, schedules, resuming and run folders."""
