"""Plain PyTorch: the truth that every kernel is held against, the CPU path, and what is trained."""
