"""Pipeline schedules as tables: written, checked, simulated, cut into stages."""
