"""The conformance suite for adapters: its table of invariants, its runner, and checks of adapters alone."""
