"""What a step of a replica takes, and what it holds."""
