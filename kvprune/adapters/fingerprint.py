"""What a saved cache remembers of the model that filled it, and how another model differs from it.

Keys and values mean something only to the model that computed them. Compared are the class, the config where
both name the same key, the geometry of each cross-attention layer, the dtype, and a digest of numbers from
each weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.adapters.base import ModelAdapter
from kvprune.errors import SavedCacheError
from kvprune.text import shown

__all__ = ["fingerprint_of", "require_same_model"]

_OF_EACH_WEIGHT = 256
"""Numbers of each weight in the digest, evenly spaced, first and last included."""

_ANY_CONFIG = frozenset(
    (
        *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "id2label"),
        *("label2id", "return_dict", "use_cache", "output_attentions", "output_hidden_states"),
    )
)
"""Keys of a config that change no key and no value; others that begin with "_" change none, either."""


def fingerprint_of(adapter: ModelAdapter) -> dict[str, Any]:
    """Return what a cache must share with a model to be read by it, JSON-ready.

    Reads a few numbers of each weight: one device transfer for each device and dtype.
    """
    model: Any = adapter.model
    return {
        "class": type(model).__name__,
        "family": adapter.family,
        "config": dict(sorted(_flat(model.config.to_dict()))),
        "layers": [_geometry(site.module, site.layer_idx) for site in adapter.sites],
        "dtype": str(next(adapter.sites[0].module.parameters()).dtype).removeprefix("torch."),
        "weights": _digest(model),
    }


def require_same_model(adapter: ModelAdapter, saved: Mapping[str, Any], where: str) -> None:
    """Raise unless a model is the one that a cache was saved with.

    Args:
        adapter: Of the model that is to read the cache.
        saved: What `fingerprint_of` returned when it was saved.
        where: Names the file, for messages.

    Raises:
        SavedCacheError: Says what differs.
    """
    own = fingerprint_of(adapter)
    before = f"{where} was saved with"
    if own["class"] != saved["class"]:
        raise SavedCacheError(
            f"{before} a {shown(saved['class'])}, but this model is a {own['class']}; load it with that model"
        )
    config = {key: saved["config"][key] for key in own["config"].keys() & saved["config"].keys()}
    differ = sorted(key for key, value in config.items() if own["config"][key] != value)
    if differ:
        pairs = [
            f"{key} {shown(config[key], 60)} there, {shown(own['config'][key], 60)} here" for key in differ
        ]
        more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
        raise SavedCacheError(
            f"{before} another {own['class']}: {'; '.join(pairs[:3])}{more}; load it with the model that it "
            "was saved with"
        )
    if own["layers"] != saved["layers"]:
        raise SavedCacheError(
            f"{before} other cross-attention layers: {shown(saved['layers'])} there, {shown(own['layers'])} "
            "here; load it with the model that it was saved with"
        )
    if own["dtype"] != saved["dtype"]:
        raise SavedCacheError(
            f"{before} a model in {shown(saved['dtype'])}, but this one is in {own['dtype']}; load the model "
            f"with dtype={shown(saved['dtype'])}, or save the cache again"
        )
    if own["weights"] != saved["weights"]:
        raise SavedCacheError(
            f"{before} other weights of {own['class']} (a fine-tuned checkpoint, or another revision); load "
            "it with the checkpoint that it was saved with"
        )


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a config by dotted name, without those that change nothing."""
    for key, value in config.items():
        if key in _ANY_CONFIG or key.startswith("_"):
            continue
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            yield from _flat(value, f"{before}{key}.")
        else:
            plain = isinstance(value, str | int | float | bool | list | None)
            yield f"{before}{key}", value if plain else str(value)


def _geometry(module: nn.Module, layer_idx: int) -> list[Any]:
    """Return the index of a layer, and the shape of each parameter of its cross-attention."""
    return [layer_idx, {name: list(weight.shape) for name, weight in sorted(module.named_parameters())}]


@torch.no_grad()
def _digest(model: nn.Module) -> str:
    """Return a SHA-256 of evenly spaced numbers of each parameter and their names and shapes."""
    found = hashlib.sha256()
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for name, weight in sorted(model.named_parameters()):
        found.update(f"{name} {list(weight.shape)};".encode())
        samples.setdefault((weight.device, weight.dtype), []).append(_sample(weight))
    for group in samples.values():
        numbers = torch.cat(group).cpu().contiguous()
        if numbers.numel():
            found.update(numbers.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _sample(weight: Tensor) -> Tensor:
    """Return up to 256 numbers of a weight, evenly spaced."""
    flat = weight.detach().reshape(-1)
    if flat.numel() <= _OF_EACH_WEIGHT:
        return flat
    places = torch.linspace(0, flat.numel() - 1, _OF_EACH_WEIGHT, dtype=torch.float64).long()
    return flat[places.to(flat.device)]
