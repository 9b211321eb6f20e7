"""Losses that the demo model is trained with, on patches and on answers, and the attention of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from kvprune.demo.pictures import COLOURS
from kvprune.demo.prompts import Packed
from kvprune.demo.tiles import SIDE, PatchLabels, Tiles

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration

__all__ = ["PatchHeads", "answer_loss", "float32_attention", "see", "silenced", "speaks"]


class PatchHeads(nn.Module):
    """Linear heads that classify each patch from its projected features; they are used in training only.

    Args:
        width: Width of the features.
    """

    weights: ClassVar = {"value": 1.0, "colour": 0.5, "centre": 0.3, "column": 0.1, "rank": 0.5}

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"value": 11, "colour": len(COLOURS) + 1, "centre": 2, "column": 2 * SIDE, "rank": 6}
        self.classes = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.balance = {name: torch.ones(size) for name, size in sizes.items()}
        self.balance["value"][-1] = self.balance["colour"][-1] = 0.05  # most patches show no digit
        self.balance["centre"][0] = 0.3

    def forward(self, features: torch.Tensor, labels: PatchLabels) -> dict[str, torch.Tensor]:
        """Return the weighted loss of each head.

        Args:
            features: Projected features [B, 4, 65, width], the class token first.
            labels: What each patch shows.
        """
        patches = features[:, :, 1:]  # [B, 4, 64, width]
        losses = {}
        for name, head in self.classes.items():
            logits, wanted = head(patches).float().flatten(0, 2), getattr(labels, name).flatten()
            losses[name] = self.weights[name] * functional.cross_entropy(logits, wanted, self.balance[name])
        return losses


def see(model: MllamaForConditionalGeneration, tiles: Tiles) -> torch.Tensor:
    """Return the projected features of pictures, [B, 4, 65, width]."""
    seen = model.model.vision_model(
        pixel_values=tiles.pixel_values,
        aspect_ratio_ids=tiles.aspect_ratio_ids,
        aspect_ratio_mask=tiles.aspect_ratio_mask,
    ).last_hidden_state
    features: torch.Tensor = model.model.multi_modal_projector(seen)[:, 0]
    return features


@contextmanager
def silenced(layer: nn.Module, speaks: torch.Tensor) -> Iterator[None]:
    """Multiply the output of a cross-attention layer at each text row by ``speaks`` [B, T]."""

    def silence(_: nn.Module, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        return output[0] * speaks[..., None].to(output[0].dtype), output[1]

    handle = layer.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def answer_loss(model: MllamaForConditionalGeneration, features: torch.Tensor, text: Packed) -> torch.Tensor:
    """Return the mean loss of the answers' tokens, given projected features [B, 4, 65, width]."""
    logits = model(
        input_ids=text.input_ids,
        position_ids=text.position_ids,
        attention_mask=text.attention_mask,
        cross_attention_mask=text.cross_attention_mask,
        cross_attention_states=features.flatten(0, 1),
        use_cache=False,
    ).logits
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), text.labels[:, 1:].flatten())


def speaks(text: Packed, share: float) -> torch.Tensor:
    """Draw for each question whether the first cross-attention layer has an output: 0 or 1, [B, T].

    Args:
        text: The questions.
        share: Share of questions for which it has an output.
    """
    question = (text.position_ids == 0).cumsum(1)  # [B, T], number of the question that a row belongs to
    drawn = (torch.rand(question.shape[0], int(question.max()) + 1) < share).float()
    return drawn.gather(1, question)


def float32_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention in float32: on a CPU its gradient is faster than in bfloat16. A mask is required."""
    mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        mixed = functional.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return mixed.transpose(1, 2), None
