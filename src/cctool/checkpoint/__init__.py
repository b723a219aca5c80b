"""The checkpoint: spec, edits, tensors, history, and the file that holds them."""
