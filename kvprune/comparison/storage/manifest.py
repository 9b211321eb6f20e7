"""The manifest's ingredients: what all units of a run share, and what cannot change an answer."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvprune.comparison.data.examples import Kind
from kvprune.comparison.plan.settings import EMBEDDED_GUIDE, NO_GUIDE, Settings
from kvprune.comparison.storage import sources
from kvprune.comparison.storage.addresses import policy_key
from kvprune.comparison.storage.code_digest import code_digest
from kvprune.comparison.storage.identity import installed_version, model_digest

__all__ = ["DEMO", "build_about", "build_context", "guide_digest"]

DEMO = "embedded demo"
"""How a manifest names the demo's model and data."""

_LIBRARIES = ("torch", "transformers", "tokenizers")
_OF_KIND: Mapping[Kind, tuple[str, ...]] = {"pictures": ("pillow",), "speech": ("soundfile", "soxr", "jiwer")}
"""Libraries that can change an answer, or what is right about it."""


def build_context(settings: Settings, kind: Kind, reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ingredients that all units of a run share. Each of them can change an answer.

    Args:
        settings: The settings, in which the device is not None.
        kind: What the examples are.
        reference: Identity of the full cache, since each answer is compared with its answer.

    Raises:
        UnsupportedModelError: If there is no such model.
    """
    return {
        "kind": kind,
        "model_digest": model_digest(sources.weights(settings.model)),
        "max_new_tokens": settings.max_new_tokens,
        "reread": settings.reread,
        "device": settings.device,
        "dtype": settings.dtype,
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
        "reference": policy_key(reference),
        "versions": {name: installed_version(name) for name in (*_LIBRARIES, *_OF_KIND[kind])},
        "kvprune_source_sha256": code_digest(),
    }


def guide_digest(settings: Settings) -> str | None:
    """Return what identifies the guide that the settings name; None where they name none.

    Raises:
        UnsupportedModelError: If there is no such model.
    """
    guide = sources.guide_weights(settings.guide)
    return None if guide is None else model_digest(guide, "--guide")


def build_about(settings: Settings) -> dict[str, Any]:
    """Return what cannot change an answer: where model, guide and data are, and the machine."""
    return {
        "model": DEMO if settings.model is None else _absolute(settings.model),
        "guide": NO_GUIDE if settings.guide is None else _absolute(settings.guide),
        "data": DEMO if settings.data is None else str(settings.data.resolve()),
        "against": settings.against,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "kvprune": installed_version("kvprune"),
        "threads": torch.get_num_threads(),
    }


def _absolute(model: str) -> str:
    is_folder = model not in (EMBEDDED_GUIDE, NO_GUIDE) and Path(model).is_dir()
    return str(Path(model).resolve()) if is_folder else model
