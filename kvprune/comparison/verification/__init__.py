"""Checks a results folder: sums again without a model, and a sample of answers with one."""
