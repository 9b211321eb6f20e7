"""Verifies a results folder: checks it without a model, and runs a sample of it again with one."""
