"""Options of `cctool prune`."""
