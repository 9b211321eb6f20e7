"""What users pass to `generate` of other speech families: prompts, languages, limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation import generate

import kvprune
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.testing import masked_oracle

SPECS = ("trim:keep_ratio=0.5", "norm:keep_ratio=0.5")
PROMPT = torch.tensor([[3, 9, 10, 11, 12]] * 2)
"""Start, language, punctuation, ... as the processors of Canary and Cohere ASR make them."""

USES: dict[str, tuple[str, dict[str, Any]]] = {
    "Moonshine: no repetitions": (
        "MoonshineForConditionalGeneration",
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ),
    "Moonshine Streaming": ("MoonshineStreamingForConditionalGeneration", {"num_beams": 2}),
    "Speech2Text: the target language": (
        "Speech2TextForConditionalGeneration",
        {"forced_bos_token_id": 9, "num_beams": 2},
    ),
    "Canary: a prompt": ("CanaryForConditionalGeneration", {"decoder_input_ids": PROMPT}),
    "Canary: prompts of different lengths": (
        "CanaryForConditionalGeneration",
        {
            "decoder_input_ids": torch.tensor([[3, 9, 10, 11, 12], [0, 0, 3, 9, 10]]),
            "decoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
        },
    ),
    "Cohere ASR: a prompt": ("CohereAsrForConditionalGeneration", {"decoder_input_ids": PROMPT}),
    "Cohere ASR: a prompt and beams": (
        "CohereAsrForConditionalGeneration",
        {"decoder_input_ids": PROMPT, "num_beams": 3},
    ),
    "SeamlessM4T: the target language": ("SeamlessM4TForSpeechToText", {"tgt_lang": "fra"}),
    "SeamlessM4T v2: the target language": ("SeamlessM4Tv2ForSpeechToText", {"tgt_lang": "fra"}),
}


@pytest.mark.parametrize("use", USES)
def test_it_equals_the_oracle(use: str) -> None:
    name, options = USES[use]
    model, batch = TINY_FAMILIES[name].example(name, torch.float64)
    if "tgt_lang" in options:
        model.generation_config.text_decoder_lang_to_code_id = {"fra": 9}

    def run_it() -> tuple[Any, Any]:
        return generate(model, dict(batch), 4, **options)[:2]

    sequences, logits = run_it()
    with kvprune.compress(model, "full"):
        found = run_it()
    assert torch.equal(found[0], sequences)
    assert torch.equal(found[1], logits)
    for spec in SPECS:
        with kvprune.compress(model, spec) as run:
            found = run_it()
        with masked_oracle(model, run.selections, run.prefill_selections):
            expected = run_it()
        assert torch.equal(found[0], expected[0])
        same = found[1] == expected[1]  # tokens that options forbid have logits of -inf
        assert float((found[1] - expected[1])[~same].abs().amax() if not same.all() else 0) <= 1e-9
        assert run.report.prefills == 1
        assert run.report.windows == ()
