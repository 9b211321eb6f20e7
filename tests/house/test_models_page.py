"""docs/models.md says what the declarations say."""

from __future__ import annotations

import functools

import models_page
import pytest
import transformers
from family_checks import settings_of

from kvprune.adapters.families import FAMILIES
from kvprune.adapters.families.refused import why_refused
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.adapters.tiny.families import TINY_FAMILIES

RENDERED = functools.cache(models_page.render)
WRITTEN = models_page.DOCUMENT.read_text("utf-8")
OF_THIS_RELEASE = f"with transformers {transformers.__version__}," in WRITTEN


@pytest.mark.skipif(not OF_THIS_RELEASE, reason="the page was written with another transformers")
def test_the_page_is_current() -> None:
    assert RENDERED() == WRITTEN, "run: python tests/models_page.py"


def test_what_the_page_says_of_supported_classes_holds_on_any_release() -> None:
    here, page = (text.partition("\n## Refused")[0] for text in (RENDERED(), WRITTEN))
    assert here.replace(transformers.__version__, "") == _without_version(page), (
        "run: python tests/models_page.py"
    )


def _without_version(page: str) -> str:
    version = page.partition("with transformers ")[2].partition(",")[0]
    return page.replace(version, "")


def test_what_this_release_refuses_is_on_the_page_with_its_reason() -> None:
    lines = [line for line in WRITTEN.splitlines() if line.startswith("| `")]
    on_page = {name: line for line in lines for name in line.split("`")[1::2]}
    for reason, names in models_page.refused_classes().items():
        for name in names:
            # A newer release has more; tests/adapters/test_refused_families.py shows these.
            assert name not in on_page or on_page[name].endswith(f"| {reason} |")


def test_every_supported_class_has_a_row() -> None:
    shown = [name for _, name, bare in models_page.rows() for name in (name, *bare)]
    declared = [name for adapter in (*FAMILIES, MllamaAdapter) for name in adapter.model_classes]
    assert sorted(shown) == sorted(declared)
    assert not any(why_refused(type(name, (), {})()) for name in declared)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_a_row_names_the_settings_that_are_compared(name: str) -> None:
    says = models_page.verified(name)
    found = settings_of(name)
    assert ("sdpa" in says) == any(attention == "sdpa" for attention, _, _ in found)
    assert ("padding" in says) == any(padded for _, padded, _ in found)
    assert ("beams" in says) == any(beams > 1 for _, _, beams in found)
