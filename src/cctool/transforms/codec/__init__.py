"""The codec of feature maps: transform, quantizer, taps, calibration, stream."""
