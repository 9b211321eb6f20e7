"""Tools for testing policies and adapters: tiny random models and the master oracle."""

from __future__ import annotations

from kvprune.testing.oracle import masked_oracle
from kvprune.testing.tiny import mllama_inputs, tiny_bart, tiny_mllama, tiny_whisper

__all__ = ["masked_oracle", "mllama_inputs", "tiny_bart", "tiny_mllama", "tiny_whisper"]
