"""Asks the policy, applies its answer to the cache, and measures what happened."""
