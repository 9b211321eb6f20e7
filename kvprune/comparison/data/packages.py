"""Says what to install where a comparison needs a package that does not come with the plain install."""

from __future__ import annotations

from kvprune.session.packages import load_package

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
        load_package(module, extra=extra, who=f"{who} needs {module}")
