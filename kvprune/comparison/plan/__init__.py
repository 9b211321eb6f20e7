"""The plan of a comparison: which policies and budgets, on which device, with which settings."""
