"""Checks of what tiny models compute under a policy."""
