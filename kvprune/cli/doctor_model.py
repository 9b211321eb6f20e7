"""What kvprune can do for a checkpoint, from its config.json alone: doctor --model.

The model is built on the meta device, which holds shapes and no numbers, so that any model takes moments and
no memory. Nothing is run, so what depends on inputs is not known.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprune.cli.findings import Check, printable_checks
from kvprune.errors import KVPruneError, UnsupportedModelError

if TYPE_CHECKING:
    from kvprune.adapters.base import ModelAdapter, Site
    from kvprune.session.registry import Registry

__all__ = ["examine_model"]

_WEIGHTS = ("*.safetensors", "*.bin")
_PAGE = "docs/adapters.md"


def examine_model(name: str) -> tuple[Check, ...]:
    """Look at a checkpoint: its adapter, its cross-attention, the cost of its cache, and what is refused.

    Args:
        name: A folder with a config.json, or the name of a checkpoint in the local cache of the Hub.

    Raises:
        UnsupportedModelError: If there is no config, or no class of transformers can be built from it.
    """
    from kvprune.adapters.without_weights import model_without_weights

    folder, model = model_without_weights(name)
    return printable_checks([*_model(folder, model), *_support(model)])


def _model(folder: Path, model: Any) -> Iterator[Check]:
    """Say what the checkpoint is."""
    files = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    gigabytes = sum(path.stat().st_size for path in files) / 1e9
    weights = f"{gigabytes:.2f} GB, not read" if files else "none in the folder; none are needed here"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    detail = f"model_type {model.config.model_type}, {parameters / 1e6:,.1f} M parameters, {_dtype(model)[1]}"
    yield Check(section="model", name=type(model).__name__, ok=None, detail=detail)
    yield Check(section="model", name="weights", ok=None, detail=weights)
    if getattr(model.config, "auto_map", None):
        detail = f"comes with the checkpoint and is not run; what follows is about {type(model).__name__}"
        yield Check(section="model", name="code", ok=None, detail=f"{detail} of transformers")


def _support(model: Any) -> Iterator[Check]:
    """Find the adapter, and say what it can do; or say why there is none."""
    from kvprune.session.registry import load

    found = load()
    try:
        cls = found.adapter_for(model)
    except KVPruneError as error:
        yield from _no_adapter(model, found, error)
        return
    entry = next(entry for entry in found.adapters if entry.cls is cls)
    origin = f"{cls.__name__} of plugin {entry.plugin} ({entry.distribution})"
    try:
        cls.require_probes()
        adapter = cls(model)
        sites = adapter.sites
    except KVPruneError as error:
        remedy = f"change the model back, or write an adapter for it ({_PAGE})"
        yield Check(section="adapter", name=cls.family, ok=False, detail=f"{origin}: {error}", remedy=remedy)
        return
    yield Check(section="adapter", name=cls.family, ok=True, detail=origin)
    yield Check(section="adapter", name="policies see", ok=None, detail=", ".join(sorted(cls.provides)))
    yield from _sites(model, sites)
    yield from _cost(adapter)
    yield from _policies(adapter, found)
    yield from _settings(model, adapter)


def _no_adapter(model: Any, found: Registry, error: KVPruneError) -> Iterator[Check]:
    """Say why no adapter supports a model, and what could be done."""
    kind, detail = type(model).__name__, str(error)
    known = {name: entry.cls.family for entry in found.adapters for name in entry.cls.model_classes}
    if detail.startswith("no adapter supports"):  # it goes on with all classes that are supported
        near = difflib.get_close_matches(kind, known, n=3, cutoff=0.5)
        listed = ", ".join(f"{name} ({known[name]})" for name in near)
        detail = f"no adapter supports {kind}" + (f"; the nearest names are {listed}" if near else "")
    sites, reason = _inspected(model)
    if sites:
        remedy = f"inspection finds {len(sites)} cross-attention modules, so four lines may do: {_PAGE}"
    elif not getattr(model.config, "is_encoder_decoder", False):
        remedy = "nothing, if it attends to no encoder: then there is no cross-attention cache to prune"
    else:
        remedy = f"write an adapter of its own ({_PAGE})"
    yield Check(section="adapter", name="none", ok=False, detail=detail, remedy=remedy)
    if reason:
        yield Check(section="adapter", name="inspection", ok=None, detail=reason)


def _inspected(model: Any) -> tuple[Sequence[Site], str]:
    """Return the sites that inspection finds in a model without an adapter, or why it finds none."""
    from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter

    class Inspected(EncoderDecoderAdapter):
        family = type(model).__name__

    try:
        return Inspected(model).sites, ""
    except UnsupportedModelError as error:
        return (), str(error)


def _sites(model: Any, sites: Sequence[Site]) -> Iterator[Check]:
    """Describe the cross-attention modules; those that are alike are described once."""
    paths = {module: path for path, module in model.named_modules()}
    alike: dict[tuple[tuple[str, str], ...], list[Site]] = {}
    for site in sites:
        alike.setdefault(tuple(_described(site)), []).append(site)
    for described, group in alike.items():
        layers = _ranges([site.layer_idx for site in group])
        path = _common([paths.get(site.module, "?") for site in group])
        for name, detail in (("layers", layers), ("module", path), *described):
            yield Check(section=f"cross-attention in {len(sites)} layers", name=name, ok=None, detail=detail)


def _described(site: Site) -> Iterator[tuple[str, str]]:
    """Yield the properties of a site, each with a name."""
    yield (
        "heads",
        f"{site.heads} for queries, {site.kv_heads} for keys and values, of width {site.head_width}",
    )
    yield "arguments", f"encoder states in {site.states}, mask in {site.mask}"
    norms = {"queries": site.query_norm, "keys": site.key_norm}
    if any(norm is not None for norm in norms.values()):
        yield "norms", "of " + " and ".join(name for name, norm in norms.items() if norm is not None)
    if site.softcap:
        yield "softcap", f"logits are capped at {site.softcap}; policies see attention without the cap"


def _ranges(numbers: Sequence[int]) -> str:
    """Return increasing numbers as text, "0 to 5" for those that follow each other."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _common(paths: Sequence[str]) -> str:
    """Return one path for several, with a star where they differ."""
    steps = [path.split(".") for path in paths]
    if len({len(one) for one in steps}) > 1:
        return ", ".join(paths)
    return ".".join(step[0] if len({*step}) == 1 else "*" for step in zip(*steps, strict=True))


def _cost(adapter: ModelAdapter) -> Iterator[Check]:
    """Say what a column is, and what it costs in the cache."""
    from kvprune.adapters.columns.counts import column_count

    model, columns, unit = adapter.model, column_count(adapter.model), adapter.column_unit.one
    size, told = _dtype(model)
    each = sum(2 * site.kv_heads * site.head_width * size for site in adapter.sites)
    kind = unit if adapter.column_seconds is None else f"{unit}, {adapter.column_seconds:g} s of sound"
    yield Check(section="cross-attention cache", name="a column", ok=None, detail=kind)
    detail = f"{each:,} bytes in all layers, keys and values, {told}"
    yield Check(section="cross-attention cache", name="holds", ok=None, detail=detail)
    if columns.usual is None:
        detail = f"their number depends on {columns.note}; 1000 take {1000 * each / 2**20:.1f} MiB"
    else:
        detail = f"{columns.usual} for {columns.note}: {columns.usual * each / 2**20:.1f} MiB"
    yield Check(section="cross-attention cache", name="a sample", ok=None, detail=detail)


def _dtype(model: Any) -> tuple[int, str]:
    """Return the bytes of a number in the dtype that a config names, and how it is called."""
    import torch

    config = model.config
    told = getattr(config, "dtype", None)
    if told is None:
        told = getattr(config.get_text_config(decoder=True), "dtype", None)
    dtype = getattr(torch, told.removeprefix("torch."), None) if isinstance(told, str) else told
    if not isinstance(dtype, torch.dtype):
        return 4, "float32 (config.json names no dtype)"
    return dtype.itemsize, str(dtype).removeprefix("torch.")


def _policies(adapter: ModelAdapter, found: Registry) -> Iterator[Check]:
    """Say which installed policies run on the model with default options, and why others are refused."""
    from kvprune.session.compression import Compression

    fit, refused, weights = [], [], {}
    for name in found.policies:
        try:
            run = Compression(adapter, found.get_policy(name), 0)
            fit.append(name)
            weights[name] = "; ".join(run.report.weights)
        except KVPruneError as error:
            refused.append((name, str(error)))
    section = f"policies, {len(fit)} of {len(found.policies)} with their default options"
    yield Check(section=section, name="run", ok=bool(fit), detail=", ".join(fit) or "none", remedy=_PAGE)
    for name, told in weights.items():
        if told:
            yield Check(section=section, name=f"{name} runs with", ok=None, detail=told)
    for name, reason in refused:
        yield Check(section=section, name=f"{name} is refused", ok=None, detail=reason)


def _settings(model: Any, adapter: ModelAdapter) -> Iterator[Check]:
    """Say which settings are refused, as far as that is known without running anything."""
    from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
    from kvprune.adapters.mllama import MllamaAdapter

    rows = [("reread=True", _rereading(adapter))]
    if isinstance(adapter, MllamaAdapter):
        rows += [("attention", _attention(model)), *_SHARED, *_MLLAMA]
    if isinstance(adapter, EncoderDecoderAdapter):
        rows += [("attention", _attention(adapter.decoder)), *_SHARED, *_ENCODER_DECODER]
    if not getattr(model.config.get_text_config(decoder=True), "use_cache", True):
        rows.append(
            ("use_cache", "False in config.json: pass use_cache=True, or use policies that decide onward")
        )
    for name, detail in rows:
        yield Check(section="settings", name=name, ok=None, detail=detail)


def _rereading(adapter: ModelAdapter) -> str:
    if adapter.rereads:
        return "works; prompts that end with padding are refused"
    return f"refused: {type(adapter).__name__} does not read the last token again"


def _attention(part: Any) -> str:
    """Return which implementations of attention a part of the model has, and what is refused of them."""
    text = "eager and sdpa work" if getattr(part, "_supports_sdpa", False) else "eager works"
    if getattr(part, "_supports_flex_attn", False):
        text += "; flex_attention works if all heads keep the same tokens, and is refused otherwise"
    if getattr(part, "_supports_flash_attn", False):
        text += "; flash attention is not tested"
    return text


_SHARED = [
    ("prefill_chunk_size", "refused: a policy would see the first chunk of the prompt only"),
    ("use_cache=False", "refused for policies that prune after attention; onward ones work"),
]
_MLLAMA = [
    ("caches", "dynamic and static ones work; quantized ones hold text only; offloaded ones are refused")
]
_ENCODER_DECODER = [
    ("caches", "dynamic and static ones work; quantized and offloaded ones are refused"),
    ("gradient checkpointing", "refused while training"),
    ("masks of the encoder", "[B, S] of zeros and ones; 4-D and additive ones are refused"),
]
