"""`cctool prune`: the steps of a pruning, what each one needs, and the cut itself."""
