"""What the adapter for Mllama relies on in transformers."""

from __future__ import annotations

from kvprune.adapters.arguments import CACHE
from kvprune.adapters.generation import probe_generation
from kvprune.adapters.probes import Probe, probe_cache, probe_signatures

__all__ = ["mllama_probes"]


def mllama_probes() -> list[Probe]:
    """Check that transformers has the names and signatures that the hooks use."""
    signatures = probe_signatures(
        "transformers.models.mllama.modeling_mllama",
        {
            "MllamaForConditionalGeneration": ("cross_attention_mask", "pixel_values"),
            "MllamaModel": ("cross_attention_mask", "cross_attention_states", CACHE),
            "MllamaTextModel": ("full_text_row_masked_out_mask", "cross_attention_states"),
            "MllamaCrossAttentionDecoderLayer": (
                "cross_attention_states",
                "cross_attention_mask",
                CACHE,
            ),
            "MllamaTextCrossAttention": ("cross_attention_states", "attention_mask", CACHE),
            "MllamaTextSelfAttention": ("position_embeddings", CACHE),
            "MllamaVisionAttention": ("attention_mask",),
        },
    )
    from transformers.models.mllama import modeling_mllama  # slow to import

    rotates = hasattr(modeling_mllama, "apply_rotary_pos_emb")
    rotary = f"{'has' if rotates else 'lacks'} apply_rotary_pos_emb"
    named = Probe("modeling_mllama", rotates, rotary)
    return [probe_cache(), probe_generation(), *signatures, named]
