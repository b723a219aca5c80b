"""Which units go: orders, rates and targets."""
