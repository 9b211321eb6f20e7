"""The results folder: its manifest, its lines, how it is claimed, written and read."""
