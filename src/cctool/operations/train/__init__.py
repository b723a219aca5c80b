"""`cctool train` and `distill`: the course of a training, its processes, its run folder, and resuming."""
