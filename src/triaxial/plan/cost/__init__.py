"""What one device and one collective cost: operators, compute, links."""
