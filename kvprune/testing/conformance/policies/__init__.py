"""Checks of policies: the suite and its table."""
