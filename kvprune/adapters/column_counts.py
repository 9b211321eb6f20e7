"""How many encoder columns a sample usually has, as far as the config of a model says."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["ColumnCount", "column_count"]

_EXTRA = {"vit": 1, "beit": 1, "dinov2": 1, "blip_vision_model": 1, "deit": 2}
"""Columns that encoders of pictures put before patches: class tokens, and DeiT's token for distillation."""


@dataclass(frozen=True)
class ColumnCount:
    """The encoder columns of one sample.

    Attributes:
        usual: How many a sample usually has; None if that depends on the input.
        note: What that number stands for, or what the number depends on.
    """

    usual: int | None
    note: str


def column_count(model: nn.Module) -> ColumnCount:
    """Return what the config of a model says about the number of its encoder columns; nothing is run.

    Args:
        model: A model of transformers, which may be on the meta device.
    """
    config: Any = model.config
    main = str(getattr(model, "main_input_name", "input_ids"))
    if config.model_type == "mllama":
        vision = config.vision_config
        tiles = int(vision.max_num_tiles)
        usual = tiles * (_patches(vision.image_size, vision.patch_size) + 1)
        return ColumnCount(usual, f"a picture, held as {tiles} tiles whatever its size")
    if config.model_type == "whisper":
        return ColumnCount(int(config.max_source_positions), "any sound, padded to 30 seconds")
    if main == "input_ids" and "pixel_values" in inspect.signature(model.forward).parameters:
        return ColumnCount(None, "the picture and the text")
    if main == "input_ids":
        return ColumnCount(None, "the text" + _at_most(getattr(config, "encoder", config)))
    pictures = getattr(config, "encoder", None) or getattr(config, "vision_config", None)
    of_picture = None if pictures is None else _picture(pictures)
    return ColumnCount(of_picture, "the input" if of_picture is None else "a picture")


def _at_most(config: Any) -> str:
    """Return how long a text may be, in words; empty if its encoder has no limit."""
    for name in ("max_encoder_position_embeddings", "max_position_embeddings"):  # LED has the first one
        if isinstance(most := getattr(config, name, None), int):
            return f" (at most {most} tokens)"
    return ""


def _picture(config: Any) -> int | None:
    """Return the columns of a picture of the size that a vision encoder is made for; None if unknown."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if size is None or patch is None:
        return None
    if config.model_type in _EXTRA:
        return _patches(size, patch) + _EXTRA[config.model_type]
    if config.model_type in ("swin", "donut-swin"):  # each stage but the first makes one patch of four
        return int(_patches(size, patch) // 4 ** (len(config.depths) - 1))
    return None


def _patches(size: int | Sequence[int], patch: int | Sequence[int]) -> int:
    """Return how many patches a picture has; sizes are one number, or height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return (height // rows) * (width // columns)
