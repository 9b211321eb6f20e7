"""What is supported, said by the tests that show it: each row of docs/supported.md is one test.

`python tests/surface_table.py` writes the table; a test fails while the file is older than the tests.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ("Mllama", "BART", "Whisper")
DOCUMENT = Path(__file__).parents[1] / "docs" / "supported.md"

ROWS: list[Row] = []

HEAD = """# What is supported

Each row is a test in `tests/surface/`, run with `full`, `trim` and `norm` (or what the row says) on tiny
random models of the real transformers classes, in float64 unless the row says otherwise.
`python tests/surface_table.py` writes this page from them, and a test fails when it is stale. *works* means
equal to what the row names. *refused* means an error, typed and before anything is computed wrongly, that
says what to do instead. The *oracle* is the untouched model with the dropped columns masked (KV13): at most
1e-6 off in float64 (usually exactly 0), 1e-5 in float32. A cell is empty where the row has no test for a
family.
"""

TAIL = """
## Not run
* CUDA, several GPUs, real 11B weights: `pytest -m gpu` holds what is ready to run on one GPU.
* Quantized caches with the quanto and hqq backends: only fp8 is run. Ours takes the place of any of them.
* Compiled flex attention (it crashes the CPU build of torch; run uncompiled here), inductor with CUDA graphs.
* Continuous batching and paged caches.
* Families besides these three: [models](models.md) lists what is verified of each.
"""


@dataclass(frozen=True)
class Row:
    """One feature: where it belongs, whether it works, for which families, and what it equals or says."""

    area: str
    feature: str
    works: bool
    families: tuple[str, ...]
    proof: str


def works(area: str, feature: str, equals: str, families: Sequence[str] = FAMILIES) -> Callable[..., Any]:
    """Declare that a test shows a feature to work; its argument ``family`` takes each of the families."""
    return _declare(Row(area, feature, True, tuple(families), equals))


def refused(area: str, feature: str, says: str, families: Sequence[str] = FAMILIES) -> Callable[..., Any]:
    """Declare that a test shows a feature to be refused by a typed error that says what to do."""
    return _declare(Row(area, feature, False, tuple(families), says))


def _declare(row: Row) -> Callable[..., Any]:
    ROWS.append(row)
    return pytest.mark.parametrize("family", row.families)


def collect() -> None:
    """Import every file of tests/surface, which fills the table in file order."""
    folder = Path(__file__).parent / "surface"
    sys.path[:0] = [str(folder), str(Path(__file__).parent / "support")]
    ROWS.clear()
    for module in sorted(one.name for one in pkgutil.iter_modules([str(folder)])):
        sys.modules.pop(module, None)
        importlib.import_module(module)


def render() -> str:
    """Return docs/supported.md."""
    lines = [HEAD]
    for area in dict.fromkeys(row.area for row in ROWS):
        lines += [
            f"## {area}",
            "",
            f"| | {' | '.join(FAMILIES)} | equals, or says |",
            "|---|---|---|---|---|",
        ]
        for row in (one for one in ROWS if one.area == area):
            mark = "works" if row.works else "refused"
            cells = [mark if family in row.families else "" for family in FAMILIES]
            lines.append(f"| {row.feature} | {' | '.join(cells)} | {row.proof} |")
        lines.append("")
    return "\n".join(lines) + TAIL


if __name__ == "__main__":
    import surface_table as table  # the module that the tests fill, not this script

    table.collect()
    DOCUMENT.write_text(table.render(), encoding="utf-8")
