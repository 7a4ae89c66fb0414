"""What is spread: the architecture, its decoder in PyTorch, and its weights."""

IGNORE = -100
"""A label that counts neither in the loss nor in its mean."""
