"""The conformance suite for policies: its table of invariants, its runner, and the check of the class."""
