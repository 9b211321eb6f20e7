"""The settings of a run as its manifest records them: written there, and read back from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvprune.comparison.plan.grid import Configuration
from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage import sources
from kvprune.comparison.storage.manifest import build_manifest, model_digest
from kvprune.errors import ResultsError

__all__ = ["describe", "recorded_settings", "recorded_specs"]

_DEMO = "embedded demo"
"""How a manifest names the demo's model and data."""

_TYPES: dict[str, tuple[type, ...]] = {
    "limit": (int, type(None)),
    "seed": (int,),
    "batch_size": (int,),
    "max_new_tokens": (int,),
    "reread": (bool,),
    "device": (str,),
    "dtype": (str,),
    "attn_implementation": (str, type(None)),
    "trust_remote_code": (bool,),
}
"""Settings that a manifest records under "run" as they are, and their types in JSON."""


def describe(configurations: Sequence[Configuration], settings: Settings) -> dict[str, Any]:
    """Return the manifest of a run.

    Args:
        configurations: What is compared.
        settings: The settings, in which tasks and device are no longer None.

    Raises:
        UnsupportedModelError: If there is no such model.
    """
    run = {
        "tasks": list(settings.tasks or ()),
        **{name: getattr(settings, name) for name in _TYPES},
        "model_digest": model_digest(sources.weights(settings.model)),
        "data_origin": "file" if settings.data else "demo",
    }
    about = {
        "model": _DEMO if settings.model is None else _absolute(settings.model),
        "data": _DEMO if settings.data is None else str(settings.data.resolve()),
        "threads": torch.get_num_threads(),
    }
    return build_manifest(configurations, run, about)


def recorded_settings(folder: Path, manifest: Mapping[str, Any]) -> Settings:
    """Return the settings that a manifest records, except that code that comes with a model is never trusted.

    Args:
        folder: The results folder.
        manifest: The manifest of that folder.

    Raises:
        ResultsError: If something is missing or of another type.
        KVPruneError: If a value is out of range.
    """
    run, about = manifest["run"], manifest.get("about", {})
    problems = [*_wrong_settings(run), *_wrong_origins(run, about)]
    if problems:
        raise ResultsError(f"{folder / 'manifest.json'} is damaged: {problems[0]}")
    settings = Settings(
        model=None if about["model"] == _DEMO else about["model"],
        data=Path(about["data"]) if run["data_origin"] == "file" else None,
        tasks=tuple(run["tasks"]),
        output=folder,
        **{name: run[name] for name in _TYPES},
    )
    return replace(settings, trust_remote_code=False)


def _wrong_settings(run: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each setting that is missing or of another type."""
    for name, types in _TYPES.items():
        value = run.get(name)
        known = name in run and isinstance(value, types)
        if not known or (isinstance(value, bool) and bool not in types):  # True is an int for Python
            yield f"run.{name} is {value!r:.60}"


def _wrong_origins(run: Mapping[str, Any], about: object) -> Iterator[str]:
    """Yield a sentence for each thing that does not say which model and which data were used."""
    tasks, origin = run.get("tasks"), run.get("data_origin")
    if not _is_list_of(str, tasks):
        yield f"run.tasks is {tasks!r:.60}"
    if origin not in ("file", "demo"):
        yield f"run.data_origin is {origin!r:.60}"
    if not isinstance(about, dict) or not _is_list_of(str, [about.get(name) for name in ("model", "data")]):
        yield "about.model or about.data is not a string"


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def recorded_specs(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the specs of the configurations that a manifest records, the full cache first.

    Raises:
        ResultsError: If something is missing or of another type.
    """
    policies = manifest["run"].get("policies")
    specs = [one.get("spec") for one in policies] if _is_list_of(dict, policies) else []
    if not specs or not _is_list_of(str, specs) or len(set(specs)) < len(specs):
        raise ResultsError(f"{folder / 'manifest.json'} is damaged: run.policies is {policies!r:.60}")
    return specs


def _absolute(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model
