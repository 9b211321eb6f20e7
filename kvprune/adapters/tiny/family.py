"""What tiny random models of declared families have in common: sizes, batches, and how a model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.tiny.models import Example, random_model

__all__ = [
    "BART",
    "BERT",
    "DECODER",
    "SPECIAL",
    "TOKENS",
    "Batch",
    "MakeBatch",
    "MakeConfig",
    "Part",
    "TinyFamily",
    "config_of",
    "draws",
    "pair_of",
    "pictures",
    "sounds",
    "texts",
    "with_padding",
]

Batch = dict[str, Tensor]
MakeBatch = Callable[[torch.dtype, bool], Batch]
MakeConfig = Callable[[Any], Any]


@dataclass(frozen=True)
class TinyFamily:
    """How to make a tiny model of one class of transformers, and a batch for it.

    Args:
        config: Returns the model's config, given the module ``transformers``.
        batch: Returns two samples of a dtype, the second one padded if asked.
        pads: Whether the encoder knows padding.
        beams: Whether stock transformers can search with beams.
        sdpa: Whether stock transformers has SDPA for it.
        settings: Attributes of the model's generation config.
    """

    config: MakeConfig
    batch: MakeBatch
    pads: bool = True
    beams: bool = True
    sdpa: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def model(
        self, name: str, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa", seed: int = 0
    ) -> Any:
        """Return a random model in eval mode.

        Args:
            name: Name of its class in transformers; what follows a space says which of several it is.
            dtype: Dtype of its weights.
            attn_implementation: "sdpa" or "eager".
            seed: Seed of its weights.
        """
        import transformers  # slow to import its models

        config = self.config(transformers)
        model = random_model(getattr(transformers, name.split()[0]), config, seed, dtype, attn_implementation)
        for setting, value in self.settings.items():
            setattr(model.generation_config, setting, value)
        with torch.no_grad():
            for place, parameter in enumerate(model.parameters()):
                if parameter.ndim == 1 and not parameter.any():  # a bias that would change nothing
                    parameter.copy_(draws(len(parameter), dtype=dtype, seed=place) / 8)
        return model

    def example(self, name: str, dtype: torch.dtype) -> Example:
        """Return a model and a batch."""
        return self.model(name, dtype, "sdpa" if self.sdpa else "eager"), self.batch(dtype, True)


def draws(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return random numbers of a shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_padding(values: Tensor, real: int, name: str, *, ones: int, padded: bool) -> Batch:
    """Return values ``[2, N, ...]`` whose second row ends with padding, with a mask ``[2, ones]``."""
    if not padded:
        return {name: values}
    mask = torch.ones(2, ones, dtype=torch.long)
    mask[1, real:] = 0
    shape = mask.shape + (1,) * (values.ndim - 2)
    return {name: values * mask.view(shape).to(values.dtype), "attention_mask": mask}


def texts(dtype: torch.dtype, padded: bool) -> Batch:
    """Two texts of 12 tokens."""
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return with_padding(ids, 8, "input_ids", ones=12, padded=padded)


def pictures(dtype: torch.dtype, padded: bool) -> Batch:
    """Two pictures of 16 x 16."""
    return {"pixel_values": draws(2, 3, 16, 16, dtype=dtype)}


def sounds(name: str, *shape: int, real: int) -> MakeBatch:
    """Two sounds: waves ``[2, N]`` or features ``[2, N, C]``."""

    def batch(dtype: torch.dtype, padded: bool) -> Batch:
        return with_padding(draws(2, *shape, dtype=dtype), real, name, ones=shape[0], padded=padded)

    return batch


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = {"vocab_size": 64, **SPECIAL}
_START = {"decoder_start_token_id": 3, "forced_eos_token_id": None, "forced_bos_token_id": None}
BART: Mapping[str, Any] = {
    **TOKENS,
    **_START,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
BERT: Mapping[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def config_of(name: str, options: Mapping[str, Any], **changes: Any) -> MakeConfig:
    """Return how to make a config of a class, given its options and what differs."""
    return lambda transformers: getattr(transformers, name)(**{**options, **changes})


Part = tuple[str, Mapping[str, Any]]


def pair_of(kind: str, encoder: Part, decoder: Part) -> MakeConfig:
    """Return how to make the config of two models, of which the second attends to the first."""

    def config(transformers: Any) -> Any:
        parts = [getattr(transformers, f"{name}Config")(**options) for name, options in (encoder, decoder)]
        made = getattr(transformers, kind).from_encoder_decoder_configs(*parts)
        made.decoder_start_token_id, made.pad_token_id = 3, 0
        return made

    return config
