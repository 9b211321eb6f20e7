"""What identifies a run: configurations, model, data, settings and versions, and how two runs differ."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import inspect
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvprune.comparison.plan.grid import Configuration
from kvprune.errors import UnsupportedModelError
from kvprune.policy.nesting import parts
from kvprune.text import printable

__all__ = ["FORMAT", "KIND", "build_manifest", "differences", "digest", "first_difference", "model_digest"]

KIND, FORMAT = "kvprune comparison", 3

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""What can change an answer: weights, settings, tokenizer, chat template, code; pickles are never read."""


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


def first_difference(old: object, new: object) -> str | None:
    """Name the first value in which two JSON trees differ, or return None."""
    return next(differences(old, new), None)


def differences(old: object, new: object, *, tolerance: float = 0.0, where: str = "") -> Iterator[str]:
    """Name every value in which two JSON trees differ.

    Args:
        old: One tree.
        new: The other.
        tolerance: Relative difference of floats that counts as none.
        where: Path of the trees in a larger one.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            path = f"{where}.{key}" if where else str(key)
            if key not in old or key not in new:
                yield f"{path} was {_show(old.get(key))} and is now {_show(new.get(key))}"
            else:
                yield from differences(old[key], new[key], tolerance=tolerance, where=path)
    elif isinstance(old, list) and isinstance(new, list):
        for number, (one, other) in enumerate(zip(old, new, strict=False)):
            yield from differences(one, other, tolerance=tolerance, where=f"{where}[{number}]")
        if len(old) != len(new):
            longer = old if len(old) > len(new) else new
            extra = _show(longer[min(len(old), len(new))])
            yield f"{where} had {len(old)} entries and now has {len(new)} (first extra: {extra})"
    elif not _same(old, new, tolerance):
        yield f"{where} was {_show(old)} and is now {_show(new)}"


def model_digest(model: str) -> str:
    """Return what identifies a model: SHA-256 of local files, or a hub model's commit, or its name.

    Args:
        model: Local folder or hub id.

    Raises:
        UnsupportedModelError: If there is no such model.
    """
    try:
        return _digest_of(Path(model)) if Path(model).is_dir() else _commit_of(model)
    except Exception as error:  # a hub's client and a file system fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(f"cannot find model {model!r}: {reason}") from error


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()}):
        with file.open("rb") as opened:
            total.update(f"{file.name}:{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _commit_of(model: str) -> str:
    from transformers import PretrainedConfig

    # Reads config.json and nothing else: AutoConfig would offer to run code that comes with the model.
    found, _ = PretrainedConfig.get_config_dict(model)
    commit = found.get("_commit_hash")
    return f"commit:{commit}" if commit else f"name:{model}"


def _same(old: object, new: object, tolerance: float) -> bool:
    if isinstance(old, bool) or isinstance(new, bool):
        return old is new
    if isinstance(old, float | int) and isinstance(new, float | int):
        return old == new or math.isclose(old, new, rel_tol=tolerance, abs_tol=0.0)
    return old == new


def _describe(configuration: Configuration) -> dict[str, Any]:
    policy = configuration.policy
    return {
        "spec": configuration.spec,
        **policy.spec.to_dict(),
        "plugin": configuration.plugin,
        "distribution": configuration.distribution,
        "source_sha256": _sources_digest([type(part) for part in parts(policy)]),
    }


def _sources_digest(classes: list[type]) -> str:
    """Digest of the modules of a policy and of those in its options: none is edited unnoticed."""
    digests = [_source_digest(cls) for cls in classes]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


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
    names = [
        "kvprune",
        "torch",
        "transformers",
        *sorted({name for c in configurations for name in (c.distribution, *c.inner)}),
    ]
    versions = {}
    for name in dict.fromkeys(names):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _show(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False), 80)
