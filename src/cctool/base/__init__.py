"""What every package may use: errors, devices and seeds, user code, marks and copies of networks."""
