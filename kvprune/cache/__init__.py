"""The only state: the cache layers that hold what is kept."""
