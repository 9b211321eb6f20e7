"""Plugins, the registry of policies and adapters, `compress`, and guides."""
