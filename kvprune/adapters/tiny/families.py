"""Tiny random models of the declared families by the name of their class; built when asked for."""

from __future__ import annotations

from collections.abc import Mapping

from kvprune.adapters.tiny.family import TinyFamily
from kvprune.adapters.tiny.media import TINY_PICTURES, TINY_SPEECH
from kvprune.adapters.tiny.texts import TINY_TEXTS

__all__ = ["TINY_FAMILIES"]

TINY_FAMILIES: Mapping[str, TinyFamily] = {**TINY_TEXTS, **TINY_SPEECH, **TINY_PICTURES}
