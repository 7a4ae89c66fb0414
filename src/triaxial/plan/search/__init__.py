"""The best layouts of all, why they win, and what would change that."""
