"""What really happens: runs, measurements and their comparison with the plan."""
