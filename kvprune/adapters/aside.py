"""Takes hooks out of modules for a while, and puts them back where they were.

Torch calls a module that has hooks by a slower way, whatever the hooks do. So hooks that only wait are better
not there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.hooks import RemovableHandle

__all__ = ["HooksAside"]


class HooksAside:
    """Hooks that can be taken out of their modules and put back; whoever owns them still has to remove them.

    Args:
        handles: Of the hooks.
        may_leave: Whether a hook may be taken out. A module keeps its hooks if it has one that may not, such
            as one of somebody else, because then their order matters.
    """

    def __init__(
        self, handles: Iterable[RemovableHandle] = (), may_leave: Callable[[object], bool] = lambda _: True
    ) -> None:
        self._hooks: list[tuple[OrderedDict[int, Any], tuple[tuple[int, Any], ...]]] = []
        known: set[int] = set()
        for handle in handles:
            hooks = handle.hooks_dict_ref()  # those that run before a module, or after it
            if hooks is None or id(hooks) in known:
                continue
            known.add(id(hooks))
            if all(map(may_leave, hooks.values())):
                self._hooks.append((hooks, tuple(hooks.items())))

    def take(self) -> None:
        """Take the hooks out."""
        for hooks, ours in self._hooks:
            for key, _ in ours:
                hooks.pop(key, None)

    def put_back(self) -> None:
        """Put the hooks back, in front of those that others have added since."""
        for hooks, ours in self._hooks:
            later = tuple(hooks)
            hooks.update(ours)
            for key in later:
                hooks.move_to_end(key)
