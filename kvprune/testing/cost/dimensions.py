"""One decision at the dimensions of a large model, without the model: random tensors of the right shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.captured import Captured
from kvprune.policy.decode import DecodePolicy, takes_steps
from kvprune.policy.moments import FeaturePolicy, PrefillPolicy
from kvprune.policy.text_view import TextView
from kvprune.policy.view import FeatureView, LayerView
from kvprune.testing.cost.steps import StepProblem, take_step
from kvprune.tokens import randomness
from kvprune.tokens.layout import Layout
from kvprune.tokens.visibility import Visibility

__all__ = ["LLAMA_11B", "Dimensions", "Problem", "ask", "make_problem"]

Problem = FeatureView | LayerView | list[LayerView] | StepProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """What a decision's cost depends on.

    Attributes:
        tiles: of the one image, two side by side.
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
) -> Problem:
    """Return what a policy is asked about, for one sample: features, the first layer, all layers, or a step.

    Args:
        policy: Decides at which moment, and which tensors are captured.
        dimensions: Shapes.
        dtype: Of features, keys, values and queries.
        device: Where they are.
        seed: Of their numbers, which are standard normal.
    """
    size = dimensions
    if isinstance(policy, PrefillPolicy):
        return [_layer(policy, size, rank, dtype, device, seed) for rank in range(size.layers)]
    if not isinstance(policy, FeaturePolicy):
        layer = _layer(policy, size, 0, dtype, device, seed)
        if not takes_steps(policy):
            return layer
        return StepProblem(
            layer=layer, queries=_draw((1, size.query_heads, size.width), dtype, device, seed, 9)
        )
    return FeatureView(
        visibility=_one_image(size, device),
        num_layers=size.layers,
        seed=seed,
        policy_name=policy.name,
        layout_of=lambda: _two_by_two(size, device),
        captured=Captured(
            features=_draw((1, size.columns, size.features), dtype, device, seed),
            class_attention=_paid(policy, size, device, seed),
            guidance=_guidance(policy, size, device, seed),
            question=_draw((1, size.features), dtype, device, seed, 8),
        ),
    )


def ask(policy: CrossKVPolicy, problem: Problem) -> object:
    """Ask a policy for the decision that `make_problem` prepared, and return it."""
    if isinstance(policy, PrefillPolicy):
        assert isinstance(problem, list)
        return policy.conclude(problem, [policy.observe(view) for view in problem])
    if isinstance(policy, FeaturePolicy):
        assert isinstance(problem, FeatureView)
        return policy.choose(problem)
    if isinstance(problem, StepProblem):
        assert isinstance(policy, DecodePolicy)
        return policy.select(problem.layer), take_step(policy, problem)
    assert isinstance(problem, LayerView)
    return policy.select(problem)


def _layer(
    policy: CrossKVPolicy,
    size: Dimensions,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> LayerView:
    def draw(what: int, heads: int, tokens: int) -> Tensor:
        return _draw((1, heads, tokens, size.width), dtype, device, seed, rank, what)

    needs = policy.needs
    return LayerView(
        keys=draw(0, size.kv_heads, size.columns),
        values=draw(1, size.kv_heads, size.columns),
        visibility=_one_image(size, device),
        layer_idx=size.layer_idx + 5 * rank,
        rank=rank,
        num_layers=size.layers,
        scaling=size.width**-0.5,
        seed=seed,
        policy_name=policy.name,
        layout_of=lambda: _two_by_two(size, device),
        captured=Captured(
            queries=draw(2, size.query_heads, size.rows) if "queries" in needs else None,
            raw_keys=draw(3, size.kv_heads, size.columns) if "raw_keys" in needs else None,
            features=_draw((1, size.columns, size.features), dtype, device, seed, rank, 4)
            if "features" in needs
            else None,
            class_attention=_paid(policy, size, device, seed),
            guidance=_guidance(policy, size, device, seed),
            reconstruction=draw(8, size.kv_heads, size.columns)[..., 0].float().abs()
            if "reconstruction" in needs
            else None,
            text=_text(policy, size, rank, dtype, device, seed) if "text" in needs else None,
        ),
    )


def _text(
    policy: CrossKVPolicy,
    size: Dimensions,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> TextView:
    """The self-attention before a layer, with heads of the same numbers and width."""

    def draw(what: int, heads: int) -> Tensor:
        return _draw((1, heads, size.rows, size.width), dtype, device, seed, rank, what)

    return TextView(
        queries=draw(5, size.query_heads),
        keys=draw(6, size.kv_heads),
        values=draw(7, size.kv_heads),
        real=torch.ones(1, size.rows, dtype=torch.bool, device=device),
        scaling=size.width**-0.5,
        layer_idx=size.layer_idx + 5 * rank - 1,
        policy_name=policy.name,
    )


def _draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, *seeds: int) -> Tensor:
    return torch.randn(shape, generator=randomness.generator(*seeds)).to(device, dtype)


def _paid(policy: CrossKVPolicy, size: Dimensions, device: torch.device | str, seed: int) -> Tensor | None:
    """What the class token of each tile pays to its patches, if the policy needs it."""
    if "class_attention" not in policy.needs:
        return None
    paid = _draw((size.tiles, size.patches), torch.float32, device, seed, 5)
    paid[:, 0] = -torch.inf
    return paid.softmax(-1).view(1, -1)


def _guidance(
    policy: CrossKVPolicy, size: Dimensions, device: torch.device | str, seed: int
) -> Tensor | None:
    if "guidance" not in policy.needs:
        return None
    return _draw((1, size.columns), torch.float32, device, seed, 5).abs()


def _two_by_two(size: Dimensions, device: torch.device | str) -> Layout:
    grid = math.isqrt(size.patches - 1)
    return Layout.tiles(grid, torch.tensor([[2]], device=device), size.tiles, class_token=True)


def _one_image(size: Dimensions, device: torch.device | str) -> Visibility:
    return Visibility(
        rows=torch.ones(1, size.rows, size.tiles, dtype=torch.bool, device=device),
        units=torch.arange(size.tiles, device=device).repeat_interleave(size.patches)[None],
        images=torch.zeros(size.tiles, dtype=torch.int64, device=device),
        live=torch.ones(1, size.rows, dtype=torch.bool, device=device),
    )
