"""Losses that the demo model is trained with, on patches and on answers, and the attention of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional

from kvprune.demo.glyphs import GLYPHS
from kvprune.demo.pictures import COLOURS, GRID
from kvprune.demo.prompts import Packed
from kvprune.demo.tiles import PatchLabels, Tiles

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration

__all__ = ["PatchHeads", "answer_loss", "float32_attention", "see"]


class PatchHeads(nn.Module):
    """Linear heads that classify each patch from its projected features; they are used in training only.

    Args:
        width: Width of the features.
    """

    weights: ClassVar = {"glyph": 1.0, "colour": 0.5, "row": 0.1, "column": 0.1}

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"glyph": len(GLYPHS) + 1, "colour": len(COLOURS) + 1, "row": GRID, "column": GRID}
        self.classes = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        for name, size in sizes.items():
            balance = torch.ones(size)
            if name in ("glyph", "colour"):
                balance[-1] = 0.1  # many patches show no glyph
            self.register_buffer(f"balance_{name}", balance, persistent=False)

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
            balance = self.get_buffer(f"balance_{name}")
            losses[name] = self.weights[name] * functional.cross_entropy(logits, wanted, balance)
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
    with torch.autocast(query.device.type, enabled=False):
        mixed = functional.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return mixed.transpose(1, 2), None
