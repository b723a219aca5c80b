"""The training loop: batches, losses, averages, processes."""
