"""One decision at the dimensions of a large model, without the model: random tensors of the right shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.policy import CrossKVPolicy
from kvprune.view import LayerView
from kvprune.visibility import Visibility

__all__ = ["LLAMA_11B", "Dimensions", "ask", "make_problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """What a decision's cost depends on.

    Attributes:
        tiles: of the one image.
        patches: columns of each tile.
        rows: text rows of the prompt, T; all of them see the image.
        query_heads: Hq.
        kv_heads: Hkv.
        width: of one head, D.
        layers: cross-attention layers.
        layer_idx: of the first of them.
        features: width of what the encoder hands over.
    """

    tiles: int
    patches: int
    rows: int
    query_heads: int
    kv_heads: int
    width: int
    layers: int
    layer_idx: int
    features: int

    @property
    def columns(self) -> int:
        """Encoder tokens, S."""
        return self.tiles * self.patches


LLAMA_11B = Dimensions(
    tiles=4,
    patches=1601,
    rows=64,
    query_heads=32,
    kv_heads=8,
    width=128,
    layers=8,
    layer_idx=3,
    features=4096,
)
"""Llama-3.2-11B-Vision: one image of four tiles, and a short question."""


def make_problem(
    policy: CrossKVPolicy,
    dimensions: Dimensions = LLAMA_11B,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LayerView:
    """Return what a policy is asked about: the first cross-attention layer of one sample.

    Policies that decide at another moment get another view here, and `ask` hands it to them.

    Args:
        policy: Decides which tensors are captured.
        dimensions: Shapes.
        dtype: Of keys, values and queries.
        device: Where they are.
        seed: Of their numbers, which are standard normal.
    """
    random = torch.Generator().manual_seed(seed)
    size = dimensions

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, size.width, generator=random).to(device, dtype)

    return LayerView(
        keys=draw(size.kv_heads, size.columns),
        values=draw(size.kv_heads, size.columns),
        visibility=_one_image(size, device),
        layer_idx=size.layer_idx,
        rank=0,
        num_layers=size.layers,
        scaling=size.width**-0.5,
        seed=seed,
        policy_name=policy.name,
        captured_queries=draw(size.query_heads, size.rows) if "queries" in policy.needs else None,
        captured_raw_keys=draw(size.kv_heads, size.columns) if "raw_keys" in policy.needs else None,
    )


def ask(policy: CrossKVPolicy, problem: LayerView) -> object:
    """Ask a policy for the decision that `make_problem` prepared, and return it."""
    return policy.select(problem)


def _one_image(size: Dimensions, device: torch.device | str) -> Visibility:
    return Visibility(
        rows=torch.ones(1, size.rows, size.tiles, dtype=torch.bool, device=device),
        units=torch.arange(size.tiles, device=device).repeat_interleave(size.patches)[None],
        images=torch.zeros(size.tiles, dtype=torch.int64, device=device),
        live=torch.ones(1, size.rows, dtype=torch.bool, device=device),
    )
