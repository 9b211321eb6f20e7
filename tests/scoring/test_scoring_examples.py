"""The examples in docstrings of scoring, tokens, options and text say what really comes out."""

import doctest
import importlib
import pkgutil

import pytest

import kvprune.scoring
import kvprune.tokens

MODULES = sorted(
    found.name
    for package in (kvprune.scoring, kvprune.tokens)
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
)
OTHERS = ["kvprune.text", "kvprune.cache.quantization", "kvprune.policy.options", "kvprune.policy.spec"]

# Public functions of scoring that need no example of their own: they are explained by another one.
WITHOUT = {"accumulation_dtype", "attention_density", "group_counts", "in_keeping_order", "is_clamped"}
WITHOUT |= {"lines", "logit_chunks", "share_evenly"}


@pytest.mark.parametrize("name", [*MODULES, *OTHERS])
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_what_authors_call_has_an_example():
    shown = {name for name in kvprune.scoring.__all__ if ">>>" in (getattr(kvprune.scoring, name).__doc__)}
    assert set(kvprune.scoring.__all__) - shown == WITHOUT
