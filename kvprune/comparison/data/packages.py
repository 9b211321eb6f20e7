"""Says what to install where a comparison needs a package that does not come with the plain install."""

from __future__ import annotations

import importlib

__all__ = ["require"]


def require(*modules: str, extra: str = "demo", who: str = "this") -> None:
    """Raise now, and not after hours of work, if an optional dependency is missing.

    Args:
        modules: Names of the modules.
        extra: The extra of kvprune that brings them.
        who: What needs them, for the message.

    Raises:
        ModuleNotFoundError: If a module cannot be imported; names it and the command that installs it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'{who} needs {module}, which is not installed: pip install "kvprune[{extra}]"', name=module
            ) from error
