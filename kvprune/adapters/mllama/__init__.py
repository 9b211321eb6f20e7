"""Llama-3.2-Vision: tiles, gates, class tokens and two kinds of text layers need code of their own."""

from __future__ import annotations

from kvprune.adapters.mllama.adapter import MllamaAdapter

__all__ = ["MllamaAdapter"]
