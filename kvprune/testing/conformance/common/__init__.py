"""What both suites share: results, search for failures, reproducers, isolation, budgets."""
