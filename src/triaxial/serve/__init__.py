"""Inference: requests in, tokens out, under any layout."""
