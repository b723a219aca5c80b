"""Options of `cctool transform`."""
