"""How tensors are stored in fewer bits: one file an encoding."""
