"""docs/supported.md says what tests/surface shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_table_of_what_is_supported_is_current():
    here = Path(__file__).parents[1]
    code = "import surface_table as table; table.collect(); print(table.render(), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here, check=True)
    written = (here.parent / "docs" / "supported.md").read_text("utf-8")
    assert done.stdout == written, "run: python tests/surface_table.py"
