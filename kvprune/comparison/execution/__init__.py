"""Runs a comparison: loads the model, generates answers and their receipts, takes times."""
