"""Families that read pictures and pages: encoder columns are patches.

`kvprune.adapters.inspection` finds the rest. A stated quirk of transformers stands beside the declaration
that needs it.
"""

from __future__ import annotations

from kvprune.adapters.families.declared import Declared, LikeBart

__all__ = [
    "BlipAdapter",
    "Florence2Adapter",
    "PPFormulaNetAdapter",
    "Pix2StructAdapter",
    "UdopAdapter",
    "VisionEncoderDecoderAdapter",
]


class VisionEncoderDecoderAdapter(Declared):
    """Any encoder of pictures with any decoder of text: TrOCR, Donut, Nougat, captions by GPT-2."""

    family = "vision encoder-decoder"
    model_classes = ("VisionEncoderDecoderModel",)
    scaled_by_width = True  # RemBERT, RoFormer, Megatron-BERT, TAPAS name no factor


class Florence2Adapter(Declared):
    """Florence-2. Encoder columns are a picture and a text after it."""

    family = "Florence-2"
    model_classes = ("Florence2ForConditionalGeneration", "Florence2Model")


class Pix2StructAdapter(Declared):
    """Pix2Struct, MatCha and DePlot. Encoder columns are patches of a page."""

    family = "Pix2Struct"
    model_classes = ("Pix2StructForConditionalGeneration",)


class UdopAdapter(Declared):
    """UDOP, documents. Encoder columns are words on a page and its patches."""

    family = "UDOP"
    model_classes = ("UdopForConditionalGeneration", "UdopModel")


class PPFormulaNetAdapter(LikeBart):
    """PP-FormulaNet, pictures of formulas."""

    family = "PP-FormulaNet"
    model_classes = ("PPFormulaNetForConditionalGeneration", "PPFormulaNetModel")


class BlipAdapter(Declared):
    """BLIP, captions of pictures."""

    family = "BLIP"
    model_classes = ("BlipForConditionalGeneration",)
    scaled_by_width = True  # its attention divides by the square root and names no factor
