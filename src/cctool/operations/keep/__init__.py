"""What must follow the weights of a network when they are cut, changed, trained or stored."""
