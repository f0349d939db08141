"""Training of the project's own small DSA model, in plain PyTorch on one GPU."""
