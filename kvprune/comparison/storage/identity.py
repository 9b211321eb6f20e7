"""What identifies a model, a policy and the versions of libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvprune.comparison.plan.grid import Configuration
from kvprune.comparison.storage.helper_modules import helper_files
from kvprune.errors import UnsupportedModelError
from kvprune.policy.nesting import parts

__all__ = ["installed_version", "model_digest", "policy_identities"]

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Files of a model that can change an answer: weights, settings, tokenizer, chat template, code."""


def model_digest(model: str, option: str = "--model") -> str:
    """Return what identifies a model: SHA-256 of a folder's files, or commit of a hub model, or its name.

    Args:
        model: Local folder or hub id.
        option: The option that named it, for messages.

    Raises:
        UnsupportedModelError: If there is no such model.
    """
    try:
        return _digest_of(Path(model)) if Path(model).is_dir() else _commit_of(model)
    except Exception as error:  # the hub client and the file system raise errors of many classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(
            f"cannot find model {model!r}: {reason.rstrip('.')}. Without a network, give a folder on this "
            f"machine ({option} FOLDER)"
        ) from error


def policy_identities(
    configurations: Sequence[Configuration], guide: str | None = None
) -> list[dict[str, Any]]:
    """Return for each configuration all that identifies its policy, as JSON values.

    The digest of its source covers the file that defines the policy, the files of the classes that it
    extends, the modules of their packages that these import (`helper_files`), and the same for each policy
    among its options, and for the rule of a contrast.

    Args:
        configurations: What is compared.
        guide: Digest of the guide's model; identifies only configurations in which a guide takes part.
    """
    sources: dict[type, str] = {}
    versions: dict[str, str] = {}
    identities = []
    for one in configurations:
        classes: list[type] = [type(part) for part in parts(one.policy)]
        if one.contrast is not None:
            classes.append(type(one.contrast))
        for cls in classes:
            if cls not in sources:
                sources[cls] = _source_digest(cls)
        digests = [sources[cls] for cls in classes]
        names = dict.fromkeys((one.distribution, *one.inner))
        for name in names:
            if name not in versions:
                versions[name] = installed_version(name)
        identities.append(
            {
                "spec": one.spec,
                **one.policy.spec.to_dict(),
                "plugin": one.plugin,
                "distribution": one.distribution,
                "versions": {name: versions[name] for name in names},
                "source_sha256": digests[0] if len(digests) == 1 else _joint_digest(digests),
                **({"guide_digest": guide} if one.guide else {}),
            }
        )
    return identities


def installed_version(name: str) -> str:
    """Return the version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "not installed"


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


def _source_digest(cls: type) -> str:
    """Return the digest of the files that define a policy: an edited one is never taken for what it was.

    These are its own file, those of its bases outside kvprune, and the helper modules of their packages that
    they import. kvprune's own bases and rules are in `code_digest`.
    """
    try:
        classes = [cls, *(base for base in cls.__mro__[1:] if _is_foreign(base))]
        paths = dict.fromkeys(Path(inspect.getsourcefile(one) or "") for one in classes)
        for one in filter(_is_foreign, classes):
            paths |= dict.fromkeys(helper_files(one.__module__, Path(inspect.getsourcefile(one) or "")))
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    except (OSError, TypeError):
        return "unavailable"
    return digests[0] if len(digests) == 1 else _joint_digest(digests)


def _joint_digest(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _is_foreign(cls: type) -> bool:
    """Whether a class belongs neither to kvprune nor to Python itself."""
    return cls.__module__.partition(".")[0] not in {"kvprune", *sys.stdlib_module_names}
