"""`cctool transform`: weights and layers in transform domains, and codecs for feature maps."""
