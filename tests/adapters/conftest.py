"""Models and processors of families, written to folders once for all tests of a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers
from own_processors import draw_pictures, saved


@pytest.fixture
def quiet() -> Iterator[None]:
    """Silence transformers: it warns of lacking torchvision, and one of its warnings is malformed."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """PNG files of three sizes."""
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family, which has its model and its processor."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            try:
                folders[name] = saved(name, tmp_path_factory.mktemp("family"))
            except ImportError as error:  # in some releases, features are made by librosa
                pytest.skip(" ".join(str(error).split())[:80])
        return folders[name]

    return folder
