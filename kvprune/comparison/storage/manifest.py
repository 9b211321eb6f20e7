"""The manifest: what identifies a run, and how two runs differ."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import inspect
import json
import math
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvprune.comparison.plan.grid import Configuration
from kvprune.comparison.storage.code_digest import code_digest
from kvprune.errors import UnsupportedModelError
from kvprune.policy.nesting import parts
from kvprune.text import printable

__all__ = [
    "FORMAT",
    "KIND",
    "build_manifest",
    "differences",
    "digest",
    "model_digest",
    "refusal",
]

KIND, FORMAT = "kvprune comparison", 3

CODE_FIELD = "kvprune_source_sha256"
"""Field of the manifest's "run" that holds the digest of kvprune's own code; see `code_digest`."""

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Files of a model that can change an answer: weights, settings, tokenizer, chat template, code."""


def build_manifest(
    configurations: Sequence[Configuration], settings: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the manifest of a run. Two runs may share a folder only if they are equal under "run".

    Args:
        configurations: What is compared.
        settings: JSON values that can change a result; they are added under "run".
        about: JSON values that cannot change a result; they are added under "about".
    """
    return {
        "kind": KIND,
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run": {
            "policies": [_describe(configuration) for configuration in configurations],
            **settings,
            "versions": _versions(configurations),
            CODE_FIELD: code_digest(),
        },
        "about": {"platform": platform.platform(), "python": platform.python_version(), **about},
    }


def refusal(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Say why a run may not continue another one, or return None if it may.

    Args:
        old: What stands under "run" in the manifest of the folder.
        new: The same for the run that wants to use the folder.
    """
    found = list(differences(old, new))
    for what in found:
        if what.startswith(CODE_FIELD):
            return f"{what}: the code of kvprune is not what it was when this folder was written"
    edited = re.match(r"policies\[(\d+)\]\.source_sha256 ", found[0]) if found else None
    if edited:
        return f"{found[0]}: the code of {new['policies'][int(edited[1])]['spec']} has changed since"
    return found[0] if found else None


def differences(old: object, new: object, *, tolerance: float = 0.0, where: str = "") -> Iterator[str]:
    """Yield a sentence for every value in which two JSON trees differ.

    Args:
        old: The first tree, called "was" in the sentences.
        new: The second tree, called "is now".
        tolerance: Relative difference up to which floats count as equal.
        where: Path of both trees inside a larger tree, for the sentences.
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
    """Return what identifies a model: SHA-256 of a folder's files, or commit of a hub model, or its name.

    Args:
        model: Local folder or hub id.

    Raises:
        UnsupportedModelError: If there is no such model.
    """
    try:
        return _digest_of(Path(model)) if Path(model).is_dir() else _commit_of(model)
    except Exception as error:  # the hub client and the file system raise errors of many classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(f"cannot find model {model!r}: {reason}") from error


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()}):
        with file.open("rb") as opened:
            total.update(f"{file.name}:{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _commit_of(model: str) -> str:
    from transformers import PretrainedConfig

    # This reads config.json and nothing else; AutoConfig could run code that comes with the model.
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
    """Return one digest for a policy and the policies among its options."""
    digests = [_source_digest(cls) for cls in classes]
    return digests[0] if len(digests) == 1 else _joint_digest(digests)


def _source_digest(cls: type) -> str:
    """Return the digest of the file that defines a policy, and of the files of its bases outside kvprune.

    An edited policy is therefore never taken for what it was. kvprune's own bases are in `code_digest`.
    """
    try:
        bases = [base for base in cls.__mro__[1:] if _is_foreign(base)]
        paths = dict.fromkeys(inspect.getsourcefile(one) for one in (cls, *bases))
        digests = [hashlib.sha256(Path(path or "").read_bytes()).hexdigest() for path in paths]
    except (OSError, TypeError):
        return "unavailable"
    return digests[0] if len(digests) == 1 else _joint_digest(digests)


def _joint_digest(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _is_foreign(cls: type) -> bool:
    """Whether a class belongs neither to kvprune nor to Python itself."""
    return cls.__module__.partition(".")[0] not in {"kvprune", *sys.stdlib_module_names}


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
