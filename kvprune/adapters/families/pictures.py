"""Families that read pictures and pages: encoder columns are patches.

`kvprune.adapters.inspection` finds the rest. A stated quirk of transformers stands beside the declaration
that needs it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kvprune.adapters.columns.pictures import (
    Florence2Columns,
    PageColumns,
    PictureColumns,
    UdopColumns,
)
from kvprune.adapters.families.declared import RELATIVE, WITH_TEXT, Declared, LikeBart
from kvprune.tokens.layout import IMAGE_PATCH, Layout

__all__ = [
    "BlipAdapter",
    "Florence2Adapter",
    "PPFormulaNetAdapter",
    "Pix2StructAdapter",
    "UdopAdapter",
    "VisionEncoderDecoderAdapter",
]


_QUESTION = (
    "its encoder reads the question together with the picture, so no text of it is free of the question"
)
_RELATIVE_WITH_QUESTION = {**RELATIVE, "reconstruction": _QUESTION}
_WITH_QUESTION = {**Declared.lacks, "reconstruction": _QUESTION}


class VisionEncoderDecoderAdapter(PictureColumns, Declared):
    """Any encoder of pictures with any decoder of text: TrOCR, Donut, Nougat, captions by GPT-2."""

    family = "vision encoder-decoder"
    model_classes = ("VisionEncoderDecoderModel",)
    scaled_by_width = True  # RemBERT, RoFormer, Megatron-BERT, TAPAS name no factor
    provides = PictureColumns.provides | {"text"}


class Florence2Adapter(Florence2Columns, Declared):
    """Florence-2. Encoder columns are a picture and a text after it."""

    family = "Florence-2"
    model_classes = ("Florence2ForConditionalGeneration", "Florence2Model")
    provides = Florence2Columns.provides | {"text"}
    lacks = _WITH_QUESTION


class Pix2StructAdapter(PageColumns, Declared):
    """Pix2Struct, MatCha and DePlot. Encoder columns are patches of a page."""

    family = "Pix2Struct"
    model_classes = ("Pix2StructForConditionalGeneration",)
    lacks = _RELATIVE_WITH_QUESTION


class UdopAdapter(UdopColumns, Declared):
    """UDOP, documents. Encoder columns are words on a page and its patches."""

    family = "UDOP"
    model_classes = ("UdopForConditionalGeneration", "UdopModel")
    lacks = _RELATIVE_WITH_QUESTION


class PPFormulaNetAdapter(LikeBart):
    """PP-FormulaNet, pictures of formulas."""

    family = "PP-FormulaNet"
    model_classes = ("PPFormulaNetForConditionalGeneration", "PPFormulaNetModel")
    unit = IMAGE_PATCH
    provides = WITH_TEXT | {"grid"}

    def layout(self, states: Tensor) -> Layout:
        """Return the grid of the picture: it has one size, and two convolutions halve its patches."""
        config: Any = self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        for _ in range(2):
            side = -(-side // 2)
        if side * side != states.shape[1]:
            return self.unknown_layout(states, f"a picture has {side} x {side} columns by the config")
        return Layout.grid(side, side, states.device)


class BlipAdapter(PictureColumns, Declared):
    """BLIP, captions of pictures."""

    family = "BLIP"
    model_classes = ("BlipForConditionalGeneration",)
    scaled_by_width = True  # its attention divides by the square root and names no factor
    provides = PictureColumns.provides | {"text"}

    @property
    def encoder(self) -> nn.Module:
        """The vision tower: the model names none."""
        found: nn.Module = self.model.get_submodule("vision_model")
        return found
