"""DCT, DST, DFT and wavelets; layers that live in their domains; the codec of feature maps."""
