"""Shows a comparison: table, notes, figure, progress bar."""
