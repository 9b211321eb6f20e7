"""Checks of a policy on generated layer problems, without a model."""
