"""Planning, verifying and carrying out a cut."""
