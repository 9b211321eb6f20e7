"""Says what to install where a package is needed that does not come with the plain install."""

from __future__ import annotations

import importlib
from typing import Any, Literal

__all__ = ["load_package", "load_speech_package"]

_ALSO = {"soundfile": " (Debian: apt install python3-soundfile)"}


def load_package(module: str, *, extra: str, who: str) -> Any:
    """Import a module and return it.

    Args:
        module: Its name.
        extra: The extra of kvprune that brings it.
        who: What needs it, for the message.

    Raises:
        ModuleNotFoundError: If it is missing; names it and the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{who}, which is not installed: pip install "kvprune[{extra}]"{_ALSO.get(module, "")}',
            name=module,
        ) from error


def load_speech_package(module: Literal["soundfile", "soxr"]) -> Any:
    """Import a module that recordings need, and return it; raises what `load_package` raises."""
    return load_package(module, extra="speech", who=f"recordings need {module}")
