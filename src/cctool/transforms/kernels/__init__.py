"""The transforms themselves: DCT, DST, DFT, Hadamard and wavelets."""
