"""Settings of a run as its manifest records them, and read back from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

_TYPES: dict[str, tuple[type, ...]] = {
    "limit": (int, type(None)),
    "seed": (int,),
    "batch_size": (int,),
    "max_new_tokens": (int,),
    "late_tokens": (int,),
    "device": (str,),
    "dtype": (str,),
    "attn_implementation": (str, type(None)),
    "trust_remote_code": (bool,),
}


def describe(configurations: Sequence[Configuration], settings: Settings) -> dict[str, Any]:
    """Return the manifest of a run.

    Args:
        configurations: What is compared.
        settings: With tasks and device resolved.

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
    """Return the settings that a manifest records; code that comes with a model is never trusted by it.

    Args:
        folder: The results folder.
        manifest: Of that folder.

    Raises:
        ResultsError: If something is missing or of another type.
        KVPruneError: If a value is out of range.
    """
    run, about = manifest["run"], manifest.get("about")
    tasks, origin = run.get("tasks"), run.get("data_origin")
    problem = ""
    for name, types in _TYPES.items():
        value = run.get(name)
        if name not in run or not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            problem = problem or f"run.{name} is {value!r:.60}"
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        problem = problem or f"run.tasks is {tasks!r:.60}"
    if origin not in ("file", "demo"):
        problem = problem or f"run.data_origin is {origin!r:.60}"
    if not isinstance(about, dict) or not all(isinstance(about.get(name), str) for name in ("model", "data")):
        problem = problem or "about.model or about.data is no text"
    if problem or not isinstance(about, dict):
        raise ResultsError(f"{folder / 'manifest.json'} is damaged: {problem}")
    settings = Settings(
        model=None if about["model"] == _DEMO else about["model"],
        data=Path(about["data"]) if origin == "file" else None,
        tasks=tuple(tasks),
        output=folder,
        **{name: run[name] for name in _TYPES},
    )
    return replace(settings, trust_remote_code=False)


def recorded_specs(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the configurations that a manifest records, the full cache first.

    Raises:
        ResultsError: If something is missing or of another type.
    """
    policies = manifest["run"].get("policies")
    if isinstance(policies, list) and policies and all(isinstance(one, dict) for one in policies):
        specs = [one.get("spec") for one in policies]
        if all(isinstance(spec, str) for spec in specs) and len(set(specs)) == len(specs):
            return [str(spec) for spec in specs]
    raise ResultsError(f"{folder / 'manifest.json'} is damaged: run.policies is {policies!r:.60}")


def _absolute(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model
