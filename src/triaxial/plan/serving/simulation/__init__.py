"""Requests through replicas, event by event."""
