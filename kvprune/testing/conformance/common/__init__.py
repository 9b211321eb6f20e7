"""What both suites share."""
