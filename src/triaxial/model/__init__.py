"""What is spread: the architecture, its decoder in PyTorch, and its weights."""
