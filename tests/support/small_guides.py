"""A small untrained Mllama with the processor and the vision geometry of the demo, to guide its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from kvprune import demo

__all__ = ["save_guide", "untrained_guide"]


def untrained_guide(seed: int = 0, *, vision: dict[str, Any] | None = None, **text: Any) -> Any:
    """Return an untrained model of the demo's geometry with its own width, layers and heads.

    Args:
        seed: Seed of its weights.
        vision: Other settings of the vision tower.
        text: Other settings of the language model.
    """
    hf: Any = transformers
    config = hf.MllamaConfig.from_pretrained(demo.model_path())
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
    }
    for part, settings in ((config.text_config, {**small, **text}), (config.vision_config, vision or {})):
        for name, value in settings.items():
            setattr(part, name, value)
    torch.manual_seed(seed)
    model = hf.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate", "gate_attn", "gate_ffn")):  # closed, the text would see no picture
                parameter.fill_(0.5)
            elif name.endswith("q_norm.weight"):
                parameter.fill_(3.0)
    model.generation_config = hf.GenerationConfig.from_pretrained(demo.model_path())
    return model.eval()


def save_guide(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Save an untrained guide and the demo's processor to a folder, and return it."""
    hf: Any = transformers
    untrained_guide(seed, **settings).save_pretrained(folder)
    hf.AutoProcessor.from_pretrained(demo.model_path()).save_pretrained(folder)
    return folder
