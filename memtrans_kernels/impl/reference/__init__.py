"""What the operators mean, in plain PyTorch."""
