"""The questions of a comparison, and reading files that may be damaged."""
