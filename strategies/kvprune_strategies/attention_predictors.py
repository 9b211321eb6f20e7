"""What `attnpred` expects of the next row of attention, from the rows before it.

All predictors take a history ``[N, H, M, P]``, the attention that P blocks received from the last M rows, the
oldest first, and return a score of each block, ``[N, H, P]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

CHANNELS = (16, 32)
"""Channels of the two convolutions of the network."""

SHAPES: Mapping[str, tuple[int, ...]] = {
    "conv1.weight": (CHANNELS[0], 1, 3, 3),
    "conv1.bias": (CHANNELS[0],),
    "conv2.weight": (CHANNELS[1], CHANNELS[0], 3, 3),
    "conv2.bias": (CHANNELS[1],),
    "conv3.weight": (1, CHANNELS[1], 1),
    "conv3.bias": (1,),
}
"""The weights of the network, 4833 numbers."""


def initial_weights() -> dict[str, Tensor]:
    """Return the weights that training starts from, in float32: always the same, uniform by fan-in."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in SHAPES.items():
        bound = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.0
        made[name] = (2 * torch.rand(shape, generator=generator) - 1) * bound
    return made


def last(history: Tensor) -> Tensor:
    """Expect the last row again."""
    return history[:, :, -1]


def mean(history: Tensor) -> Tensor:
    """Expect the mean of the rows."""
    return history.mean(2)


def ema(history: Tensor, decay: float) -> Tensor:
    """Expect a mean in which a row counts ``decay`` times as much as the next one."""
    age = torch.arange(history.shape[2] - 1, -1, -1, device=history.device)
    weights = (decay**age).to(history)
    return (history * (weights / weights.sum())[:, None]).sum(2)


def network(weights: Mapping[str, Tensor], history: Tensor, real: Tensor | None = None) -> Tensor:
    """Expect what a small convolutional network says (AttentionPredictor, arXiv 2502.04077).

    The history is a picture of one channel, M high and P wide. Two convolutions of 3 x 3, each followed by a
    ReLU, keep its size; then come the mean over the M rows and a 1 x 1 convolution to one channel. The same
    weights serve all heads and layers, and any number of blocks.

    Args:
        weights: As `SHAPES` says.
        history: ``[N, H, M, P]``.
        real: bool ``[N, H or 1, P]``, blocks that exist; the others are treated as beyond the edge, so that a
            sample is expected the same alone and in a batch. All by default.
    """
    picture = history.flatten(0, 1)[:, None]  # [N * H, 1, M, P]
    hidden = functional.conv2d(picture, weights["conv1.weight"], weights["conv1.bias"], padding=1).relu()
    if real is not None:
        exists = real.expand(-1, history.shape[1], -1).flatten(0, 1)[:, None, None]  # [N * H, 1, 1, P]
        hidden = hidden * exists
    hidden = functional.conv2d(hidden, weights["conv2.weight"], weights["conv2.bias"], padding=1).relu()
    scores = functional.conv1d(hidden.mean(2), weights["conv3.weight"], weights["conv3.bias"])
    by_head: Tensor = scores[:, 0].unflatten(0, history.shape[:2])  # [N, H, P]
    return by_head
