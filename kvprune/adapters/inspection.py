"""Finds the cross-attention modules of a model, and the decoder that they belong to, by looking at the model.

A cross-attention module

* has a ``layer_idx``, the index of its layer in the cache,
* has a forward call that takes ``hidden_states``, a cache and encoder states,
* projects queries, keys and values itself, and
* is called something with "cross" or "enc" within its layer, such as ``encoder_attn`` or
  ``crossattention.self``. In many families self-attention is a module of the same class.

An adapter may name what inspection misses (`Overrides`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvprune.adapters.arguments import CACHE
from kvprune.adapters.sites import Site, has_projections
from kvprune.errors import UnsupportedModelError

__all__ = ["Overrides", "find_decoder", "find_sites"]

_STATES = "key_value_states", "encoder_hidden_states", "cross_attention_states"
_MASKS = "encoder_attention_mask", "mask", "attention_mask"
_CALLED = re.compile("cross|enc", re.IGNORECASE)
_DECODER = "input_ids", "encoder_hidden_states"
_TEXT = "hidden_states"
"""Argument of a cross-attention module for the text that attends."""
_LISTED = 6
"""Modules that an error message lists."""


@dataclass(frozen=True)
class Overrides:
    """What an adapter says itself; everything that is "" is found by inspection.

    Args:
        attention: Path of the cross-attention module within its decoder layer.
        states: Argument of that module for encoder states.
        mask: Argument of that module for the attention mask.
        names: Attributes of that module that project queries, keys and values.
        scaled_by_width: See `Site`.
    """

    attention: str = ""
    states: str = ""
    mask: str = ""
    names: tuple[str, str, str] = ("", "", "")
    scaled_by_width: bool = False


def find_sites(root: nn.Module, family: str, overrides: Overrides | None = None) -> dict[str, Site]:
    """Return the cross-attention modules in a model by their path, in the order of their layers.

    Args:
        root: The model, or the part of it that attends.
        family: For messages.
        overrides: What the adapter says.

    Raises:
        UnsupportedModelError: If there is none, or if one does not look as expected. The error says what was
            found, and what it lacks.
    """
    told = overrides or Overrides()
    found: dict[str, Site] = {}
    lacking: dict[str, str] = {}
    for path, module in _candidates(root, told):
        missing = _missing(module, told)
        if missing:
            lacking[path] = f"({type(module).__name__}): {missing}"
            continue
        try:
            found[path] = _site(module, told)
        except UnsupportedModelError as error:
            where = f"{family} attends to encoder states at {path}"
            raise UnsupportedModelError(f"{where}, but {error}") from error
    if not found or (told.attention and lacking):
        raise UnsupportedModelError(_nothing_found(root, family, told, lacking))
    _require_all_layers(family, found, lacking)
    ordered = sorted(found.items(), key=lambda item: item[1].layer_idx)
    indices = [site.layer_idx for _, site in ordered]
    if len({*indices}) != len(indices):
        raise UnsupportedModelError(
            f"{family} attends to encoder states at {_listed(list(found))}, and several of these "
            f"{len(found)} modules have the same layer_idx ({indices}), so they would share one layer of the "
            "cache; a model with several decoders is not supported"
        )
    return dict(ordered)


def find_decoder(root: nn.Module, family: str, paths: Sequence[str]) -> Any:
    """Return the innermost module that contains all sites and takes token ids and encoder states.

    Args:
        root: The model.
        family: For messages.
        paths: Paths of the sites.

    Raises:
        UnsupportedModelError: If there is no such module.
    """
    steps = paths[0].split(".")
    for depth in range(len(steps), -1, -1):
        around = ".".join(steps[:depth])
        if depth and not all(f"{path}.".startswith(f"{around}.") for path in paths):
            continue
        module = root.get_submodule(around)
        if set(_DECODER) <= _parameters(module):
            if hasattr(getattr(module, "config", None), "use_cache"):
                return module
            raise UnsupportedModelError(
                f"{family} attends to encoder states in {around or type(root).__name__} "
                f"({type(module).__name__}), which has no config that says use_cache; give it the "
                "model's own (self.config = config)"
            )
    raise UnsupportedModelError(
        f"{family} attends to encoder states at {_listed(paths)}, but no module of {type(root).__name__} "
        f"that contains all of them takes {' and '.join(_DECODER)}; a model with several decoders is not "
        "supported"
    )


def _candidates(root: nn.Module, told: Overrides) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose place in their layer says that they attend to encoder states."""
    for path, module in root.named_modules():
        steps = path.split(".")
        numbers = [place for place, step in enumerate(steps) if step.isdigit()]
        within = ".".join(steps[numbers[-1] + 1 :]) if numbers else ""
        if within == told.attention if told.attention else within and _CALLED.search(within):
            yield path, module


def _missing(module: nn.Module, told: Overrides) -> str:
    """Say what a module lacks to be a cross-attention module; "" if nothing."""
    parameters = _parameters(module)
    states = [told.states] if told.states else _STATES
    lacks = []
    if not parameters & set(CACHE.split("|")):
        lacks.append("its forward takes no cache (past_key_values)")
    if not parameters & set(states):
        lacks.append(f"its forward takes no {' or '.join(states)}")
    if _TEXT not in parameters:
        lacks.append(f"its forward takes no {_TEXT}")
    if getattr(module, "layer_idx", None) is None:
        lacks.append("it has no layer_idx")
    if not has_projections(module) and not all(told.names):
        lacks.append("it has no layers such as q_proj, k_proj and v_proj")
    if told.attention and getattr(module, "is_causal", False):
        lacks.append("it is causal, so it attends to the text")
    return ", ".join(lacks)


def _site(module: Any, told: Overrides) -> Site:
    parameters = list(inspect.signature(module.forward).parameters)
    states = told.states or next(name for name in _STATES if name in parameters)
    mask = told.mask or next((name for name in _MASKS if name in parameters), _MASKS[-1])
    if mask not in parameters:
        raise UnsupportedModelError(
            f"{type(module).__name__}: forward lacks {mask}; it takes {', '.join(parameters)}; set "
            "mask in the adapter to its argument for the attention mask"
        )
    return Site(module.layer_idx, module, states, mask, told.names, told.scaled_by_width)


def _nothing_found(root: nn.Module, family: str, told: Overrides, lacking: dict[str, str]) -> str:
    """Return the message for a model in which no cross-attention was found."""
    wanted = f"called {told.attention!r} in its layer" if told.attention else "called cross... or enc..."
    first: dict[str, tuple[str, str]] = {}  # of each place in a layer
    for path, missing in lacking.items():
        first.setdefault(_place(path), (path, missing))
    # Parts of a cross-attention module lack everything; what lacks least was probably meant.
    nearest = sorted(first.values(), key=lambda item: item[1].count(", "))[:_LISTED]
    near = "; ".join(f"{path} {missing}" for path, missing in nearest) or "no module is"
    hint = "the cross-attention of this model has another name, set attention in the adapter to its path"
    if told.attention and lacking:
        hint = "its arguments or layers have other names, set states, or query, key and value, in the adapter"
    return (
        f"inspection finds no cross-attention with a cache in this {type(root).__name__} ({family}): it "
        f"looks for modules {wanted} with a layer_idx, projections of their own, and a forward that takes a "
        f"cache and encoder states. Found: {near}. If {hint}"
    )


def _require_all_layers(family: str, found: dict[str, Site], lacking: dict[str, str]) -> None:
    """Raise if a module of another layer has the path of a site, and is none: it would not be pruned."""
    places = {_place(path) for path in found}
    for path, missing in lacking.items():
        if _place(path) in places:
            raise UnsupportedModelError(
                f"{family} attends to encoder states at {_listed(list(found))}, but not so at {path} "
                f"{missing}; a policy would not reach that layer"
            )


def _place(path: str) -> str:
    """Return a path with its numbers replaced: the same for the same module of each layer."""
    return ".".join("#" if step.isdigit() else step for step in path.split("."))


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return ", ".join(paths[:_LISTED]) + more


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)
