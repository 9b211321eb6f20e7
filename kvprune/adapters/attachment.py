"""Attaches hooks and attributes to a model, and removes all of them again (KV12)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Attachment", "compressing"]


class _Hook:
    """A hook that does nothing while its attachment is paused."""

    def __init__(self, attachment: Attachment, hook: Callable[..., Any]) -> None:
        self.attachment = attachment
        self.hook = hook

    def __call__(self, *call: Any) -> Any:
        return None if self.attachment.is_paused else self.hook(*call)


class Attachment:
    """Hooks and attributes on the modules of one model, until `detach`.

    Hooks that only one forward call needs (``for_one_call``) are removed by `end_of_call`.

    Args:
        model: The model.
        label: Name of what is attached, for messages.
    """

    def __init__(self, model: nn.Module, label: str) -> None:
        self.model = model
        self.label = label
        self.is_paused = False
        self._handles: list[RemovableHandle] = []
        self._call_handles: list[RemovableHandle] = []
        self._restore: list[Callable[[], None]] = []

    def detach(self) -> None:
        """Remove all hooks and restore all attributes; does nothing if nothing is attached."""
        self.end_of_call()
        while self._handles:
            self._handles.pop().remove()
        while self._restore:
            self._restore.pop()()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause all hooks in a block: the model runs as if nothing were attached, and others may attach."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def end_of_call(self) -> None:
        """Remove the hooks that were added for one forward call."""
        while self._call_handles:
            self._call_handles.pop().remove()

    def before(self, module: nn.Module, hook: Callable[..., Any], *, for_one_call: bool = False) -> None:
        """Run ``hook(module, args, kwargs)`` before a module, until `detach` or `end_of_call`."""
        handles = self._call_handles if for_one_call else self._handles
        handles.append(module.register_forward_pre_hook(_Hook(self, hook), with_kwargs=True))

    def after(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        *,
        for_one_call: bool = False,
        always: bool = False,
    ) -> None:
        """Run ``hook(module, args, kwargs, output)`` after a module; with ``always`` even if it raised."""
        handles = self._call_handles if for_one_call else self._handles
        handles.append(module.register_forward_hook(_Hook(self, hook), with_kwargs=True, always_call=always))

    def override(self, module: nn.Module, attribute: str, value: object) -> None:
        """Set an attribute on one module instance; `detach` restores the former value."""
        missing = object()
        before = module.__dict__.get(attribute, missing)

        def restore() -> None:
            if before is missing:
                del module.__dict__[attribute]
            else:
                module.__dict__[attribute] = before

        module.__dict__[attribute] = value
        self._restore.append(restore)


def compressing(model: nn.Module) -> str | None:
    """Return the label of the attachment that hooks a model or a part of it now; None if there is none."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Hook) and not hook.attachment.is_paused:
                return hook.attachment.label
    return None
