"""Questions, and reading files that may be broken."""
