"""Options of `cctool train` and `distill`."""
