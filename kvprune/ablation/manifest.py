"""What identifies a run: configurations, model, data, settings and versions, and how two runs differ."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvprune.ablation.grid import Configuration

__all__ = ["FORMAT", "KIND", "build_manifest", "first_difference", "model_digest"]

KIND, FORMAT = "kvprune comparison", 1

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "config.json")


def build_manifest(
    configurations: Sequence[Configuration], settings: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe a run; what stands under "run" must be equal for two runs to share a folder.

    Args:
        configurations: What is compared.
        settings: Everything else that can change a result, JSON values only.
        about: What is good to know but changes no result, JSON values only.
    """
    return {
        "kind": KIND,
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run": {
            "policies": [_describe(configuration) for configuration in configurations],
            **settings,
            "versions": _versions(configurations),
            "kvprune_source_sha256": _core_digest(),
        },
        "about": {"platform": platform.platform(), "python": platform.python_version(), **about},
    }


def first_difference(old: object, new: object, where: str = "") -> str | None:
    """Name the first value in which two JSON trees differ, or return None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            path = f"{where}.{key}" if where else str(key)
            if key not in old or key not in new:
                return f"{path} was {_show(old.get(key))} and is now {_show(new.get(key))}"
            difference = first_difference(old[key], new[key], path)
            if difference is not None:
                return difference
        return None
    if isinstance(old, list) and isinstance(new, list):
        for number, (one, other) in enumerate(zip(old, new, strict=False)):
            difference = first_difference(one, other, f"{where}[{number}]")
            if difference is not None:
                return difference
        if len(old) != len(new):
            longer = old if len(old) > len(new) else new
            extra = _show(longer[min(len(old), len(new))])
            return f"{where} had {len(old)} entries and now has {len(new)} (first extra: {extra})"
        return None
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return None if same else f"{where} was {_show(old)} and is now {_show(new)}"


def model_digest(model: str) -> str:
    """Return what identifies the weights: SHA-256 of local files, or a hub model's commit, or its name.

    Args:
        model: Local folder or hub id.
    """
    folder = Path(model)
    if not folder.is_dir():
        from transformers import AutoConfig

        commit = getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)
        return f"commit:{commit}" if commit else f"name:{model}"
    files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(f"{file.name}:{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _describe(configuration: Configuration) -> dict[str, Any]:
    policy = configuration.policy
    return {
        "spec": configuration.spec,
        **policy.spec.to_dict(),
        "plugin": configuration.plugin,
        "distribution": configuration.distribution,
        "source_sha256": _source_digest(type(policy)),
    }


def _source_digest(cls: type) -> str:
    """Digest of the module that defines a policy: an edited policy is never taken for its old self."""
    try:
        path = inspect.getsourcefile(cls)
        return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()
    except (OSError, TypeError):
        return "unavailable"


def _core_digest() -> str:
    """Digest of what computes in kvprune; comparing, showing and checking are left out."""
    root = Path(__file__).parents[1]
    files = [path for path in (*root.glob("*.py"), *root.glob("adapters/*.py")) if path.stem not in _NOT_CORE]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


_NOT_CORE = {"__main__", "cli", "doctor"}


def _versions(configurations: Sequence[Configuration]) -> dict[str, str]:
    names = ["kvprune", "torch", "transformers", *sorted({c.distribution for c in configurations})]
    versions = {}
    for name in dict.fromkeys(names):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
