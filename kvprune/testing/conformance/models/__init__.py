"""Checks on tiny models that generate."""
