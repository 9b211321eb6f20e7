"""From answers and times to rates, intervals and summaries."""
