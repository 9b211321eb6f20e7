"""From names to a running compression: plugins, the registry, `compress`, guides."""
