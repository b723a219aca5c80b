"""`cctool quantize`: stored weights, calibrated integers, trained quantizers, the search for bit widths."""
