"""Where quantizers go in a network, and how they are attached."""
