"""What commands say of their products."""
