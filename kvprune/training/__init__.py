"""Trains the weights of policies on a frozen model."""
