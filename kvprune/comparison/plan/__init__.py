"""What a comparison asks: policies, budgets, settings."""
