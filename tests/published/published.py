"""Recorded selections of published procedures, and what the tests of this folder share.

``data/NAME.json`` belongs to the policy NAME. It is an object with

* ``unverified``: what of the published method nobody could compare, in one sentence, or "";
* ``cases``: a list of what was recorded. Each case has
    ``source``: ``kind`` ("authors' code", "third-party port" or "transcription"), ``repository`` (owner/name,
        or the paper for a transcription), ``commit`` (or ""), ``where`` (file and function), ``date``;
    ``procedure``: one sentence that says what was run, from which input to which output, with its settings;
    ``whole``: whether this is the whole published procedure at its published settings, up to the tokens
        that it keeps, or a part of it;
    ``spec``: the policy that must select the same, for example ``snapkv:preset=published,keep_tokens=8``;
    ``problem``: numbers from which the test draws the same tensors again (seed, shapes);
    ``kept``: what was selected.

Only recorded data and sources are kept here, none of the code that was run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["DATA", "KINDS", "Case", "draw", "load", "names", "unverified"]

DATA = Path(__file__).parent / "data"
KINDS = ("authors' code", "third-party port", "transcription")


@dataclass(frozen=True)
class Case:
    """One recorded run of a published procedure; the fields are those of the JSON file."""

    source: dict[str, str]
    procedure: str
    whole: bool
    spec: str
    problem: dict[str, Any]
    kept: Any

    def __str__(self) -> str:
        return f"{self.spec}-{self.problem.get('seed', 0)}"


def names() -> list[str]:
    """Return the policies that have recorded selections."""
    return sorted(path.stem for path in DATA.glob("*.json"))


def load(name: str) -> list[Case]:
    """Return the cases of a policy."""
    return [Case(**case) for case in _read(name)["cases"]]


def unverified(name: str) -> str:
    """Return what of a policy's method could not be compared."""
    return str(_read(name)["unverified"])


def _read(name: str) -> dict[str, Any]:
    return dict(json.loads((DATA / f"{name}.json").read_text("utf-8")))


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return normally distributed numbers; equal for equal seeds and shapes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
