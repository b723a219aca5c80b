"""Options of `cctool quantize`."""
