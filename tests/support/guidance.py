"""What a stock model attends to, by plain loops over the weights that eager attention returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvprune
from kvprune import Decision
from kvprune.adapters.tiny.models import tiny_mllama


def probe(views: list[Any], *, layers: bool = False) -> kvprune.CrossKVPolicy:
    """A policy that needs guidance, decides nothing, and notes the views that it is shown."""

    @dataclass(frozen=True, kw_only=True)
    class Probe(kvprune.FeaturePolicy):
        name = "probe"
        keeps_invisible = True

        @property
        def needs(self) -> Any:
            return frozenset({"guidance"})

        def choose(self, view: Any) -> Decision:
            views.append(view)
            return Decision()

        def select(self, view: Any) -> Decision:
            if layers:
                views.append(view)
            return Decision()

    return Probe()


def attention_modules(model: Any) -> list[Any]:
    """The cross-attention modules of a model, in order."""
    if model.config.is_encoder_decoder:
        return [layer.encoder_attn for layer in model.get_decoder().layers]
    text = getattr(model, "model", model).language_model
    return [text.layers[index].cross_attn for index in text.config.cross_attention_layers]


class Watched:
    """Collects the attention weights of all cross-attention layers while a stock model runs, by call."""

    def __init__(self, model: Any) -> None:
        assert model.config._attn_implementation == "eager"
        self.model = model
        self.calls: list[list[Tensor]] = []

    def __enter__(self) -> Watched:
        modules = attention_modules(self.model)
        seen = [0] * len(modules)

        def watch(place: int) -> Any:
            def note(module: Any, args: Any, output: Any) -> None:
                if seen[place] == len(self.calls):
                    self.calls.append([])
                self.calls[seen[place]].append(output[1].detach().double())
                seen[place] += 1

            return note

        self._handles = [module.register_forward_hook(watch(n)) for n, module in enumerate(modules)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def slow_sum(call: list[Tensor], counted: list[list[int]]) -> list[list[float]]:
    """Attention of chosen rows by sample, summed over layers and heads, ``[B][S]``."""
    total = [[0.0] * call[0].shape[-1] for _ in counted]
    for weights in call:
        for sample, rows in enumerate(counted):
            for head in weights[sample]:
                for row in rows:
                    for column, weight in enumerate(head[row].tolist()):
                        total[sample][column] += weight
    return total


def live_rows_of(inputs: dict[str, Tensor]) -> list[list[int]]:
    """Rows of an Mllama's prompt that see an image and are no padding."""
    sees = inputs["cross_attention_mask"].flatten(2).any(-1) & inputs["attention_mask"].bool()
    return [[row for row, flag in enumerate(flags) if flag] for flags in sees.tolist()]


def alone(inputs: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """Cut an Mllama's inputs to one sample, without left padding and the images of other samples."""
    real = inputs["attention_mask"][sample].bool()
    images = int(inputs["cross_attention_mask"][sample].any(-1).any(0).sum())
    cut = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
    for name in ("input_ids", "attention_mask", "cross_attention_mask"):
        cut[name] = cut[name][:, real]
    cut["cross_attention_mask"] = cut["cross_attention_mask"][:, :, :images]
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        cut[name] = cut[name][:, :images]
    return cut


def stock_importance(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a stock model attends to, over its layers, heads and live rows: each sample alone, ``[B, S]``."""
    columns = 5 * inputs["cross_attention_mask"].shape[2] * 4
    found = []
    for sample in range(len(inputs["input_ids"])):
        one = alone(inputs, sample)
        with Watched(model) as watched, torch.no_grad():
            model(**one)
        (row,) = slow_sum(watched.calls[0], live_rows_of(one))
        found.append(row + [0.0] * (columns - len(row)))
    return torch.tensor(found).double()


def small(attention="sdpa", seed=2, dtype=torch.float32):
    """Another model of the same geometry: other weights, two cross layers instead of three."""
    return tiny_mllama(seed, dtype=dtype, attn_implementation=attention, cross_layers=(1, 2))
