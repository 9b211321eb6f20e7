"""Statistics of a comparison: rates, paired differences, speed, and the summary."""
