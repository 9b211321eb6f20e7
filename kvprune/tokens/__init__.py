"""Which encoder tokens there are, who sees them, and which of them are kept."""
