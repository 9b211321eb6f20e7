"""Reads and replaces arguments of forward calls by name, across releases of transformers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kvprune.errors import UnsupportedModelError

__all__ = [
    "CACHE",
    "STATES",
    "cache_argument",
    "cache_of",
    "has_cache",
    "named_arguments",
    "returned_cache",
    "tokens_of",
    "with_cache",
    "with_returned_cache",
    "with_states",
    "without_cache",
]

_CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache argument: since transformers 5.24, and before."""

CACHE = "|".join(_CACHE_NAMES)
"""The same names in the form that `probe_signatures` reads: any one of them."""

STATES = "encoder_outputs", "encoder_hidden_states"
"""Arguments that bring what the encoder has returned."""


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a forward call by name, including positional ones."""
    if not args:
        return kwargs
    if not torch.compiler.is_compiling() and "forward" not in module.__dict__:
        named = dict(zip(_positional_names(type(module).forward), args, strict=False))
        if len(named) == len(args) and named.keys().isdisjoint(kwargs):
            return named | kwargs
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    named = dict(bound.arguments)
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in named:
            named.update(named.pop(name))
    return named


@functools.lru_cache(maxsize=256)
def _positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of what a method takes by position, without self.

    Kept, because hooks ask in each layer at each token, and reading a signature takes as long as a layer.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)


def tokens_of(named: Mapping[str, Any]) -> Any:
    """Return token ids ``[B, T]``, or else their embeddings ``[B, T, C]``; None if there are neither."""
    return named["input_ids"] if named.get("input_ids") is not None else named.get("inputs_embeds")


def cache_of(named: Mapping[str, Any]) -> Any:
    """Return the cache argument of a forward call; None if there is none."""
    for name in _CACHE_NAMES:
        if named.get(name) is not None:
            return named[name]
    return None


def with_cache(named: Mapping[str, Any], cache: object) -> dict[str, Any]:
    """Return the arguments with their cache replaced."""
    return {**named, **{name: cache for name in _CACHE_NAMES if named.get(name) is not None}}


def without_cache(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments without their cache."""
    return {name: value for name, value in named.items() if name not in _CACHE_NAMES}


def cache_argument(model: nn.Module, cache: object) -> dict[str, Any]:
    """Return a cache as the keyword argument that a model's forward call takes."""
    known = inspect.signature(model.forward).parameters
    return {next((name for name in _CACHE_NAMES if name in known), _CACHE_NAMES[-1]): cache}


def returned_cache(output: object) -> Any:
    """Return the cache in the output of a model or of `generate`; None if there is none."""
    return next((found for name in _CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)


def with_returned_cache(output: Any, cache: object) -> Any:
    """Return an output of `generate` with another cache."""
    fields = {field.name for field in dataclasses.fields(output)}
    name = next(name for name in _CACHE_NAMES if name in fields)
    return type(output)(**without_cache(output), **{name: cache})


def has_cache(named: Mapping[str, Any], config: Any) -> bool:
    """Whether a forward call has a cache, or transformers will create one for it.

    Args:
        named: Arguments of the call by name.
        config: The config of the model.
    """
    use_cache = named.get("use_cache")
    return cache_of(named) is not None or bool(config.use_cache if use_cache is None else use_cache)


def with_states(named: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Return the arguments of a call; raise if they do not say what the encoder has returned.

    Raises:
        UnsupportedModelError: Names the family and the arguments that were looked for.
    """
    if all(named.get(name) is None for name in STATES):
        raise UnsupportedModelError(
            f"generate of {family} passes none of {', '.join(STATES)} to the model, so a second branch "
            "would run the encoder again; its adapter must define second_call()"
        )
    return dict(named)
