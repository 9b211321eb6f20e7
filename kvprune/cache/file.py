"""The file of a saved cache: tensors in the safetensors format, and a header whose digest covers them.

The header is JSON in the metadata of the file. It has the SHA-256 of each tensor, and a SHA-256 of its own,
so that a file that was cut off or changed is noticed when it is read. A file is written beside its
destination and then renamed, so nobody ever sees half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import SavedCacheError
from kvprune.text import shown

__all__ = ["FORMAT", "digest_of", "read_file", "write_file"]

FORMAT = 1
"""Version of the file format; raised when an older reader would misread a file."""

_KEY = "kvprune_cache"


def digest_of(*tensors: Tensor) -> str:
    """Return a SHA-256 of tensors: their dtypes, shapes and bytes; 64 hexadecimal digits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()


def write_file(
    path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], *, overwrite: bool
) -> None:
    """Write tensors and a header to a file, all or nothing.

    Args:
        path: Where.
        header: JSON-ready; must not use the names "format", "tensors" and "digest".
        tensors: By name, on any device.
        overwrite: Whether a file that is already there is replaced.

    Raises:
        SavedCacheError: If there is a file and `overwrite` is false, or the file cannot be written.
    """
    from safetensors.torch import save_file  # slow to import

    if path.exists() and not overwrite:
        raise SavedCacheError(f"{path} exists already; choose another path, or pass overwrite=True")
    # Each tensor gets a buffer of its own: safetensors refuses views of one.
    here = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    full = {**header, "format": FORMAT, "tensors": {name: digest_of(here[name]) for name in sorted(here)}}
    full["digest"] = _digest(full)
    try:
        handle, name = tempfile.mkstemp(prefix=".kvprune-", dir=path.parent)
        os.close(handle)
        try:
            save_file(here, name, metadata={_KEY: _text(full)})
            os.chmod(name, 0o644)
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SavedCacheError(f"{path} cannot be written ({error}); choose another path") from error


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file, and compare each digest with what was read.

    Returns:
        The header, and the tensors by name, on the CPU.

    Raises:
        SavedCacheError: If it is no file of a saved cache, has another format version, or was changed.
    """
    from safetensors import SafetensorError, safe_open  # slow to import

    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            # Copied: how a tensor lies in a mapped file can change the last bit of what is computed from it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        missing = not path.exists()
        why = "there is no such file" if missing else f"it is no safetensors file, or was cut off ({error})"
        raise SavedCacheError(
            f"{path} cannot be read: {why}; pass the path of a file that run.save(...) has written"
        ) from error
    digests = header["tensors"]
    if not isinstance(digests, dict) or digests.keys() != tensors.keys():
        raise SavedCacheError(f"{path} was changed: it has other tensors than its header says; save it again")
    for name, tensor in tensors.items():
        if digest_of(tensor) != digests[name]:
            raise SavedCacheError(
                f"{path} was changed: tensor {shown(name)} has another digest than its header says; save it "
                "again"
            )
    return header, tensors


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the header of a file, checked."""
    if _KEY not in metadata:
        raise SavedCacheError(
            f"{path} is a safetensors file, but no saved cache (its metadata has no {_KEY!r}); pass the path "
            "of a file that run.save(...) has written"
        )
    try:
        header = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise SavedCacheError(
            f"{path} was changed: its header is no JSON ({error}); save it again"
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise SavedCacheError(
            f"{path} has format version {shown(found)}, and this version of kvprune reads {FORMAT}; save it "
            "again with this version, or install the version of kvprune that wrote it"
        )
    if header.pop("digest", None) != _digest(header):
        raise SavedCacheError(
            f"{path} was changed: its header has another digest than it says; save it again"
        )
    return header


def _text(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def _digest(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(header).encode()).hexdigest()
