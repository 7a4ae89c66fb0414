"""Training: data, optimizer, the loop and its checkpoints."""
