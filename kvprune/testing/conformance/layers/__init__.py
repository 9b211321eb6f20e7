"""Checks of what a policy answers about layer problems, without a model."""
