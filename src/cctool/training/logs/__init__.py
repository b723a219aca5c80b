"""Where a training writes its figures."""
