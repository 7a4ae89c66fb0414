"""Checkpoints: what every rank holds, by global names, so that any layout continues what any other has saved."""
