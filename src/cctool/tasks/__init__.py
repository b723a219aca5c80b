"""What networks are for: losses, metrics, targets and predictions, a file a task."""
