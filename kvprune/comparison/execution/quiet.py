"""Keeps quiet what transformers says in each call of Whisper's ``generate``, however it is called."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_warnings"]

_STARTS = ("Both `max_new_tokens`", "Both `min_new_tokens`", "Passing `generation_config` together")
"""How warnings begin that Whisper causes by how it calls ``generate`` of its base class."""


@contextmanager
def without_warnings() -> Iterator[None]:
    """Drop these warnings, and no others, within this block."""
    logger = logging.getLogger("transformers.generation.utils")

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_STARTS)

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
