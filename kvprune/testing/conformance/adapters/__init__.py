"""Checks of adapters."""
