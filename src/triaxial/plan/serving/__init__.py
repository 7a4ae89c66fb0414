"""Serving: what a step of an engine costs, and what traffic makes of it."""
