"""Forward hooks that checks put on a model for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle

__all__ = ["temporary"]


@contextmanager
def temporary(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block, also after an exception.

    Args:
        handles: What registering returned. An iterator is read at the start of the block; hooks that it
            registered are removed if it raises.
    """
    registered: list[RemovableHandle] = []
    try:
        registered.extend(handles)
        yield
    finally:
        for handle in registered:
            handle.remove()
