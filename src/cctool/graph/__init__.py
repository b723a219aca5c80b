"""One traced forward pass: coupled channels, shapes and costs."""
