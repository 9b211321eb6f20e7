"""Who may read a pruned cache layer: a model under compression, until it is released.

A pruned layer holds fewer entries than transformers' masks cover. Hooks of the model under compression cut
the masks; nobody else does. So a layer knows its reader, and no module can read it once the reader is
released.
"""

from __future__ import annotations

from typing import Any, Self

__all__ = ["Reader"]


class Reader:
    """A model under compression, as its cache layers know it.

    Copies of a cache share the reader. A pickle comes back with a reader that is released.
    """

    def __init__(self, *, is_attached: bool = True) -> None:
        self.is_attached = is_attached

    def release(self) -> None:
        """Say that masks are no longer cut."""
        self.is_attached = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _released, ()


def _released() -> Reader:
    return Reader(is_attached=False)
