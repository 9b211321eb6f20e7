"""Tiny random models of real transformers classes, and inputs for them; built when asked for."""
