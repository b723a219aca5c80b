"""What makes rounded networks better without training: AdaRound, bias correction, equalization."""
