"""How many encoder columns a sample usually has, as far as the config of a model says."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvprune.adapters.columns.pictures import known_grid

__all__ = ["ColumnCount", "column_count"]


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
        usual = tiles * ((int(vision.image_size) // int(vision.patch_size)) ** 2 + 1)
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
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    layout = known_grid(config, height, width, torch.device("cpu"))
    return None if layout is None else layout.places.shape[1]
