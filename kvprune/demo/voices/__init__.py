"""Recordings of synthetic voices: `python -m kvprune.demo.voices`."""
