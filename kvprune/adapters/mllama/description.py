"""Makes the prompt after which an Mllama describes pictures, whatever the question about them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.prompts import distinct_rows
from kvprune.adapters.reconstruction import Context, Writing, require_generating
from kvprune.engine.guidance import Prompt
from kvprune.errors import GuideError
from kvprune.policy.reconstruction import Reconstruction

__all__ = ["Describing", "describing"]

_UNPROMPTED = (
    "the reconstruction is what the model writes about the picture unprompted, which may be no description "
    "of it; give prompt_ids that ask for one, such as 'Describe the image.' in the model's chat template"
)
_IMAGE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class Describing(ModelAdapter):
    """The part of the adapter that reconstructs pictures."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._pixels: Tensor | None = None

    def detach(self) -> None:
        """Undo `attach`, and forget the pictures."""
        super().detach()
        self._pixels = None

    def keep_pixels(self, pixels: Tensor) -> None:
        """Keep the pictures ``[B, images, tiles, channels, height, width]`` of a call that brings none.

        It brings what the encoder has made of them. A description is written from the pictures themselves,
        because ``generate`` takes no encoder states. `context` forgets them.
        """
        if "reconstruction" in self.manager.policy.needs:
            self._pixels = pixels

    def require_reconstruction(self) -> None:
        """Raise unless the model can write a description."""
        require_generating(self.model, self.family)

    def context(self, prompt: Prompt, request: Reconstruction) -> Context:
        """Return the prompt of a description; the model must write it."""
        config: Any = self.model.config
        pixels, self._pixels = self._pixels, None
        if pixels is not None:
            rows = distinct_rows(pixels, len(pixels) // len(prompt.text))
            prompt = replace(prompt, arguments={**prompt.arguments, "pixel_values": rows})
        return Context(
            describing(config, prompt, request.prompt_ids), note="" if request.prompt_ids else _UNPROMPTED
        )

    def write(self, prompt: Prompt, max_new_tokens: int) -> Writing:
        """Write a description."""
        text, written = self.answer(prompt, max_new_tokens)
        is_cut = text.shape[1] >= max_new_tokens and bool(written[:, -1].any())
        return Writing(text, written, text.shape[1], is_cut)


def describing(config: Any, prompt: Prompt, prompt_ids: Sequence[int]) -> Prompt:
    """Return a prompt that asks for a description of the pictures of each sample.

    Without an image token among the ids, one for each picture of the sample and the start of text come first.
    All rows after the last image token see all pictures.

    Args:
        config: The model's config.
        prompt: Inputs of the target's forward call; its text is not read.
        prompt_ids: Token ids.

    Raises:
        GuideError: If the pictures came in a later turn, or as encoder states.
    """
    if prompt.past is not None:
        raise GuideError(
            "an image came in a later turn of a conversation, and a reconstruction would not see the earlier "
            "ones; give the whole conversation at once"
        )
    given = prompt.arguments
    if "pixel_values" not in given:
        raise GuideError(
            "a description of a picture is generated from pixel_values, but the model was called with "
            "cross_attention_states; pass pixel_values and aspect_ratio_ids"
        )
    pixels = given["pixel_values"]  # [R, images, tiles, channels, height, width]
    mask = given.get("cross_attention_mask")  # [R, T, images, tiles]
    if mask is None:
        mask = torch.ones(pixels.shape[0], 1, *pixels.shape[1:3], dtype=torch.int64, device=pixels.device)
    tiles = (mask == 1).any(1)  # [R, images, tiles]
    image = int(config.image_token_index)
    start = config.text_config.bos_token_id
    rows = [
        list(prompt_ids) if image in prompt_ids else [image] * count + [start] + list(prompt_ids)
        for count in tiles.any(-1).sum(-1).tolist()
    ]
    length = max(map(len, rows))
    pad = config.text_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=pixels.device)  # [R, T]
    real = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=pixels.device)
    place = torch.arange(length, device=pixels.device)
    last_image = torch.where(ids == image, place, -1).amax(-1, keepdim=True)  # [R, 1]
    sees = (place >= last_image) & real.bool()  # [R, T]
    arguments: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": real,
        "position_ids": (real.cumsum(-1) - 1).clamp(min=0),
        "cross_attention_mask": (sees[:, :, None, None] & tiles[:, None]).to(mask.dtype),
        **{name: given[name] for name in _IMAGE if name in given},
    }
    return Prompt(arguments, prompt.states)
