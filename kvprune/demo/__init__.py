"""Data to try policies on: a small trained Mllama with pictures full of glyphs, and recorded speech."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvprune.demo.examples import Example, examples, write_dataset
from kvprune.demo.recordings import SPEECH_MODEL, speech_data
from kvprune.demo.tasks import TASKS

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration, ProcessorMixin

__all__ = [
    "SPEECH_MODEL",
    "TASKS",
    "Example",
    "examples",
    "guide_path",
    "load",
    "model_path",
    "speech_data",
    "write_dataset",
]


def model_path() -> Path:
    """Return the folder of the embedded model, for any `from_pretrained`."""
    return Path(__file__).resolve().parent / "model"


def guide_path() -> Path:
    """Return the folder of a smaller model that can guide the embedded one; `load` loads it."""
    return Path(__file__).resolve().parent / "guide"


def load(
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    device: str | torch.device = "cpu",
    path: str | Path | None = None,
) -> tuple[MllamaForConditionalGeneration, ProcessorMixin]:
    """Load the embedded model and its processor without network access.

    Args:
        dtype: Data type of the weights.
        attn_implementation: "sdpa", "eager" or another one that transformers knows.
        device: Device to put the model on.
        path: Another folder to load from.

    Returns:
        The model, in evaluation mode, and the processor.
    """
    import transformers

    hf: Any = transformers  # its loading functions are not fully typed
    folder = str(path if path is not None else model_path())
    processor = hf.AutoProcessor.from_pretrained(folder, local_files_only=True)
    model = hf.MllamaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation=attn_implementation, local_files_only=True
    )
    return model.to(device).eval(), processor
