"""Attaches hooks to a model, and removes all of them again (KV12).

Nothing here outlives what it belongs to. Hooks of one forward call are removed when it ends, or, if an
interrupt (Ctrl-C) ended it, before the next one starts. Hooks in a copy or a pickle of a model do nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from kvprune.adapters.aside import HooksAside
from kvprune.cache.reader import Reader
from kvprune.errors import CompressionStateError

__all__ = ["Attachment", "compressing"]


class _Hook:
    """A hook that does nothing while its attachment is paused, and in copies of its module.

    Args:
        attachment: Owns the hook.
        hook: The function to call.
        thread: If given, calls from other threads are ignored.
        watches: Whether it also runs while its attachment waits; it changes nothing.
    """

    def __init__(
        self,
        attachment: Attachment,
        hook: Callable[..., Any],
        thread: int | None = None,
        *,
        watches: bool = False,
    ) -> None:
        self.attachment = attachment
        self.hook = hook
        self.thread = thread
        self.watches = watches

    def __call__(self, *call: Any) -> Any:
        attachment = self.attachment
        stopped = attachment.in_pause if self.watches else attachment.is_paused
        if stopped or self._is_foreign():
            return None
        return self.hook(*call)

    def _is_foreign(self) -> bool:
        if self.thread is None or torch.compiler.is_compiling():
            return False
        return self.thread != threading.get_ident()

    def __deepcopy__(self, memo: dict[int, Any]) -> _NoHook:
        return _NoHook()

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """Stands in a copied or unpickled module where the original has a hook; does nothing."""

    def __call__(self, *call: Any) -> None:
        return None


class _Method:
    """A method of one module instance that another function calls; in copies of the module, the plain method.

    Args:
        module: The module; nothing of it is changed but its attribute ``name``.
        name: Name of the method.
        attachment: Calls are passed on while it is paused; None in copies and pickles.
        around: Called with the method and its arguments.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        attachment: Attachment | None = None,
        around: Callable[..., Any] | None = None,
    ) -> None:
        self.module, self.name, self.attachment, self.around = module, name, attachment, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = functools.partial(getattr(type(self.module), self.name), self.module)
        if self.around is None or self.attachment is None or self.attachment.is_paused:
            return method(*args, **kwargs)
        return self.around(method, *args, **kwargs)

    def __reduce__(self) -> tuple[type[_Method], tuple[nn.Module, str]]:
        return _Method, (self.module, self.name)


class _Paused(AbstractContextManager[None]):
    """The block of `Attachment.paused`: a class, because a generator takes longer, and each token enters."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def __enter__(self) -> None:
        self._before = self._attachment._paused_by
        self._attachment._paused_by = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._attachment._paused_by = self._before


class _Resumed(_Paused):
    """The block of `Attachment.resumed`."""

    def __enter__(self) -> None:
        attachment = self._attachment
        with attachment._lock:
            if attachment._resumed_by is not None:
                raise CompressionStateError(
                    f"{attachment.label} runs in another thread; use a lock around calls of "
                    f"{type(attachment.model).__name__}, or a copy of the model for each thread"
                )
            attachment._resumed_by = threading.get_ident()
        attachment._aside.put_back()

    def __exit__(self, *error: object) -> None:
        self._attachment._aside.take()
        self._attachment._resumed_by = None


class Attachment:
    """Hooks and attributes on the modules of one model, until `detach`.

    Hooks that only one forward call needs (``for_one_call``) are removed by `close_call`.

    Args:
        model: The model.
        label: Name of what is attached, for messages.

    Attributes:
        reader: Pruned cache layers can be read while this reader is attached.
    """

    def __init__(self, model: nn.Module, label: str) -> None:
        self.model = model
        self.label = label
        self.reader = Reader()
        self.calls = 0
        self._handles: list[RemovableHandle] = []
        self._call_handles: list[RemovableHandle] = []
        self._restore: list[Callable[[], None]] = []
        self._caller: threading.Thread | None = None
        self._lock = threading.Lock()
        self._paused_by: int | None = None  # identity of a thread
        self._waits = False
        self._resumed_by: int | None = None  # identity of a thread
        self._aside = HooksAside()

    def detach(self) -> None:
        """Remove all hooks and restore all attributes; does nothing if nothing is attached."""
        self._caller = None
        self._waits = False
        self._aside = HooksAside()
        self.reader.release()
        self.reader = Reader()
        self.end_of_call()
        while self._handles:
            self._handles.pop().remove()
        while self._restore:
            self._restore.pop()()

    @property
    def is_paused(self) -> bool:
        """Whether hooks do nothing in this thread now."""
        if self._paused_by is None and not self._waits:
            return False
        me = threading.get_ident()
        return self._paused_by == me or (self._waits and self._resumed_by != me)

    @property
    def in_pause(self) -> bool:
        """Whether this thread is in a block of `paused` now."""
        return self._paused_by == threading.get_ident()

    def paused(self) -> AbstractContextManager[None]:
        """Pause all hooks in a block: the model runs as if nothing were attached, and others may attach.

        Only for this thread; others are refused, as in the middle of any call.
        """
        return _Paused(self)

    def wait(self) -> None:
        """From now on, hooks do nothing in any thread, but in a block of `resumed`.

        Modules that nobody else has hooked are called without them: torch calls a module with hooks by a
        slower way, whatever these do.
        """
        self._waits = True
        self._aside = HooksAside(self._handles, self._may_leave)
        self._aside.take()

    def _may_leave(self, hook: object) -> bool:
        """Whether nothing is missed if a hook is not there while this attachment waits."""
        return isinstance(hook, _Hook) and hook.attachment is self and not hook.watches

    def resumed(self) -> AbstractContextManager[None]:
        """Let the hooks of an attachment that waits run in a block, in this thread.

        Raises:
            CompressionStateError: When the block is entered, if another thread is in such a block.
        """
        return _Resumed(self)

    def open_call(self) -> None:
        """Start a forward call of the model: every adapter calls this first, and `close_call` at the end.

        Removes what an interrupted call has left: torch runs no hook after a ``KeyboardInterrupt``.

        Raises:
            CompressionStateError: If another thread is inside a forward call.
        """
        if torch.compiler.is_compiling():
            return
        me = threading.current_thread()
        with self._lock:
            caller = self._caller
            if caller is not None and caller is not me and caller.is_alive():
                raise CompressionStateError(
                    f"thread {caller.name!r} is inside a forward call of this {type(self.model).__name__}, "
                    f"and thread {me.name!r} calls it as well; a model under compression answers one thread "
                    "at a time: use a lock around its calls, or a copy of the model for each thread"
                )
            self._caller = me
        self.calls += 1
        self.end_of_call()

    @property
    def in_call(self) -> bool:
        """Whether this thread is in a forward call; not if `open_call` refused it."""
        return torch.compiler.is_compiling() or self._caller is threading.current_thread()

    def close_call(self) -> None:
        """End the forward call of this thread; from then on, others may call the model."""
        if torch.compiler.is_compiling():
            return
        self.end_of_call()
        self._caller = None

    def end_of_call(self) -> None:
        """Remove the hooks that were added for one forward call."""
        while self._call_handles:
            self._call_handles.pop().remove()

    def before(
        self, module: nn.Module, hook: Callable[..., Any], *, for_one_call: bool = False, first: bool = False
    ) -> None:
        """Run ``hook(module, args, kwargs)`` before a module, until `detach` or `close_call`.

        Args:
            module: The module.
            hook: The hook.
            for_one_call: Whether `close_call` removes it.
            first: Run it before the hooks that the module has by now, so that they have changed nothing yet.
        """
        handles, thread = self._kind(for_one_call)
        ours = _Hook(self, hook, thread)
        handles.append(module.register_forward_pre_hook(ours, with_kwargs=True, prepend=first))

    def after(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        *,
        for_one_call: bool = False,
        always: bool = False,
        first: bool = False,
        watches: bool = False,
    ) -> None:
        """Run ``hook(module, args, kwargs, output)`` after a module, until `detach` or `close_call`.

        Args:
            module: The module.
            hook: The hook.
            for_one_call: Whether `close_call` removes it.
            always: Run it even if the module raised an ``Exception``.
            first: Run it before the hooks that the module has by now, so that they see what it returns.
            watches: Run it also while this attachment waits; it only notes what it sees.
        """
        handles, thread = self._kind(for_one_call)
        handles.append(
            module.register_forward_hook(
                _Hook(self, hook, thread, watches=watches),
                with_kwargs=True,
                always_call=always,
                prepend=first,
            )
        )

    def _kind(self, for_one_call: bool) -> tuple[list[RemovableHandle], int | None]:
        if for_one_call:
            return self._call_handles, threading.get_ident()
        return self._handles, None

    def override(self, module: nn.Module, attribute: str, value: object) -> None:
        """Set an attribute on one module instance; `detach` restores the former value.

        A copy of the module keeps the value, so prefer an argument of its forward call, or `around`.
        """
        missing = object()
        before = module.__dict__.get(attribute, missing)

        def restore() -> None:
            if before is missing:
                del module.__dict__[attribute]
            else:
                module.__dict__[attribute] = before

        module.__dict__[attribute] = value
        self._restore.append(restore)

    def around(self, module: nn.Module, method: str, call: Callable[..., Any]) -> None:
        """Call ``call(method, *args, **kwargs)`` in place of a method of one module instance, until `detach`.

        Args:
            module: The module.
            method: Name of a method of its class. Nothing happens if it has none, or if somebody else has
                replaced it on the instance.
            call: Receives the method, bound to the module, and its arguments.
        """
        if method in module.__dict__ or not hasattr(type(module), method):
            return
        module.__dict__[method] = _Method(module, method, self, call)
        self._restore.append(lambda: module.__dict__.pop(method, None))


def compressing(model: nn.Module) -> str | None:
    """Return the label of the attachment that hooks a model or a part of it now; None if there is none."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Hook) and not hook.attachment.is_paused:
                return hook.attachment.label
    return None
