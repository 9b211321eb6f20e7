"""Runs a comparison: loads the model, generates answers, takes times."""
