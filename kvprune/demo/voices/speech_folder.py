"""The folder of a speech set: whether it may be written to, its manifest, and its table."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvprune.errors import DataError
from kvprune.text import printable, shown

__all__ = ["AGAIN", "SpeechFolder", "named"]

AGAIN = "delete it, and the same command makes it again"
"""What helps against a damaged file; for messages."""

_CHOOSE = "choose a new or empty folder"
_KIND = "kvprune synthetic speech"


class SpeechFolder:
    """A folder with `manifest.json`, recordings in `audio/`, and at the end `speech.jsonl`.

    Args:
        path: The folder; `claim` makes it.
        origin: All that the recordings depend on, as JSON values. The manifest holds it, and recordings of
            another origin are never added.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        self.path = path
        self.origin: dict[str, Any] = {"kind": _KIND, **json.loads(json.dumps(origin))}
        self.table, self.manifest = path / "speech.jsonl", path / "manifest.json"

    def claim(self) -> int:
        """Check that the folder is of the same origin, or is new or empty; return how many rows it has.

        Raises:
            DataError: If it holds something else, or recordings of another origin.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{named(self.path)} is no folder; {_CHOOSE}")
        rows = self._rows() if self.manifest.exists() else self._begin()
        (self.path / "audio").mkdir(exist_ok=True)
        return rows

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each recording that `speech.jsonl` lists, by id; nothing if there is none.

        Raises:
            DataError: If `speech.jsonl` is damaged.
        """
        if not self.table.exists():
            return {}
        try:
            rows = [json.loads(line) for line in self.table.read_text("utf-8").splitlines()]
            return {row["id"]: row["sha256"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{named(self.table)} is damaged; {AGAIN}") from error

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `speech.jsonl` with these rows, and the manifest that counts them."""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        self.write(self.table, lines.encode())
        self._write_manifest(rows)

    @staticmethod
    def write(path: Path, content: bytes) -> None:
        """Write a file whole or not at all."""
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def _begin(self) -> int:
        others = sorted(one.name for one in self.path.iterdir()) if self.path.exists() else []
        if any(name != f"{self.manifest.name}.part" for name in others):
            raise DataError(f"{named(self.path)} holds other files, such as {shown(others[0])}; {_CHOOSE}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_manifest([])
        return 0

    def _rows(self) -> int:
        """Return how many rows the manifest counts, after a check that the origin is the same."""
        try:
            former = json.loads(self.manifest.read_bytes())
        except ValueError as error:
            raise DataError(f"{named(self.manifest)} is no JSON file; {_CHOOSE}") from error
        if not isinstance(former, dict) or former.get("kind") != _KIND:
            raise DataError(f"{named(self.path)} holds something else than {_KIND}; {_CHOOSE}")
        for name, value in self.origin.items():
            if former.get(name) != value:
                raise DataError(
                    f"{named(self.path)} was made with other {name}: {shown(former.get(name), 600)}, now "
                    f"{shown(value, 600)}; {_CHOOSE}"
                )
        rows = former.get("recordings")
        if not isinstance(rows, int):
            raise DataError(f"{named(self.manifest)}: recordings is {shown(rows)}, not a number; {_CHOOSE}")
        return rows

    def _write_manifest(self, rows: Sequence[Mapping[str, Any]]) -> None:
        seed, kinds = self.origin.get("seed"), ("task", "synthesiser", "voice")
        manifest = {
            **self.origin,
            "recordings": len(rows),  # 0 until speech.jsonl is there
            "seconds": round(sum(row["seconds"] for row in rows), 1),
            "counts": {kind: dict(Counter(str(row[kind]) for row in rows)) for kind in kinds},
            "command": f"python -m kvprune.demo.voices --output FOLDER --count {len(rows)} --seed {seed}",
        }
        self.write(self.manifest, (json.dumps(manifest, indent=2) + "\n").encode())


def named(path: Path) -> str:
    """Return a path for a message."""
    return printable(str(path), 400)
