"""What a decode step costs under policies that decide in it, relative to policies that decide in prefill.

`python tests/step_costs.py --model FOLDER` measures Whisper; without a model, a random Mllama whose layers
have the dimensions of Llama-3.2-11B-Vision. `--sound FILE` gives Whisper a recording instead of noise, and
`--tiny FAMILY` measures a tiny model of the tests. With `--contrast`, contrasts take the place of policies.
Each policy makes equally many tokens for each row, of one recording window. Policies take turns within each
repetition, so each ratio is one of times that were taken side by side.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent / "support"))

from step_policies import Fixed
from torch import Tensor

import kvprune

__all__ = ["Keeps", "measure", "ratios", "wide_inputs", "wide_mllama"]

TOKENS = 32
"""Tokens that are timed, after the first one."""


@dataclass(frozen=True, kw_only=True)
class Keeps(kvprune.ScoringPolicy):
    """Keep the entries whose keys are longest: what `Fixed` reads in each step."""

    name = "keeps"

    def score(self, view: kvprune.LayerView) -> Tensor:
        """Return the lengths of the keys ``[B, Hkv, S]``."""
        return view.keys.double().norm(dim=-1)


def policies(ratio: float) -> Mapping[str, Any]:
    """Return what is measured, by name; ratios are to the policy that decides in prefill."""
    return {
        "prefill": Keeps(keep_ratio=ratio),
        "fixed": Fixed(keep_ratio=ratio),
        "quest": kvprune.get_policy(f"quest:keep_ratio={ratio}"),
        "attnpred": kvprune.get_policy(f"attnpred:keep_ratio={ratio},predictor=ema"),
        "off-load": kvprune.get_policy(f"attnpred:keep_ratio={ratio},predictor=ema,offload=true"),
        "full": kvprune.get_policy("full"),
    }


def contrasts(model: Any, ratio: float) -> Mapping[str, Any]:
    """Return what is measured with ``--contrast``, by name; ratios are to the full cache."""

    def against(policy: str, rule: str) -> Callable[[], Any]:
        return lambda: kvprune.contrast(model, f"{policy}:keep_ratio={ratio}", rule)

    return {
        "full": kvprune.get_policy("full"),
        "divprune, mint": against("divprune", "mint"),
        "snapkv, mod": against("snapkv", "mod"),
        "quest, mod": against("quest", "mod"),
    }


def wide_mllama(device: str, cross_layers: Sequence[int] = (1, 3)) -> Any:
    """Return a random Mllama with the dimensions of the 11B model's layers, few of them, in bfloat16."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    vision = MllamaVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=32,
        vision_output_dim=32,
        image_size=560,
        patch_size=14,
        max_num_tiles=4,
        intermediate_layers_indices=[0],
    )
    text = MllamaTextConfig(
        vocab_size=64,
        hidden_size=4096,
        num_hidden_layers=max(cross_layers) + 1,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        cross_attention_layers=list(cross_layers),
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=61)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = MllamaForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(before)
    return model


def wide_inputs(device: str, rows: int = 1) -> dict[str, Tensor]:
    """Return an image of four tiles, 6404 columns, and a short question, for each row."""
    ids = torch.tensor([[61, 5, 6, 7]]).expand(rows, -1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 1, 4, 3, 560, 560, generator=torch.Generator().manual_seed(0)),
        "aspect_ratio_ids": torch.full((rows, 1), 6),
        "aspect_ratio_mask": torch.ones(rows, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(rows, 4, 1, 4, dtype=torch.long),
    }
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def whisper(folder: str, sound: str | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Return Whisper, and features of a recording, or else of noise."""
    from transformers import AutoFeatureExtractor, WhisperForConditionalGeneration

    from kvprune.comparison.data.audio import read_audio, resampled

    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if sound is None:
        random = torch.Generator().manual_seed(0)
        features = torch.randn(1, model.config.num_mel_bins, 3000, generator=random)
    else:
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        samples = resampled(read_audio(Path(sound)), extractor.sampling_rate)
        features = extractor(
            samples, sampling_rate=extractor.sampling_rate, return_tensors="pt"
        ).input_features
    prompt = torch.tensor([[50258, 50259, 50359, 50363]])  # English, without timestamps
    return model, {"input_features": features, "decoder_input_ids": prompt}


def tiny(family: str) -> tuple[Any, dict[str, Tensor]]:
    """Return a tiny model of the tests, and one sample for it."""
    from families import inputs_of, model_of

    return model_of(family, torch.float32), inputs_of(family, "one", torch.float32)


def measure(model: Any, inputs: Mapping[str, Tensor], named: Mapping[str, Any], repetitions: int) -> Any:
    """Return seconds per token by name, one for each repetition; policies take turns.

    Args:
        model: The model.
        inputs: What it generates from.
        named: Policies, or functions that return a block to generate in.
        repetitions: Turns that are measured.
    """
    from transformers import GenerationMixin

    # On a CPU that others use as well, the time of one thread says more.
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time

    def lap(policy: Any) -> float:
        calls: list[float] = []  # when each token was there, as the host knows

        def note(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            if not calls:
                _wait(model)
            calls.append(clock())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        block = policy() if callable(policy) else kvprune.compress(model, policy)
        with block, torch.no_grad():
            GenerationMixin.generate(  # Whisper's own reads on where a time stamp ends a window
                model,
                **inputs,
                max_new_tokens=1 + TOKENS,
                min_new_tokens=1 + TOKENS,
                do_sample=False,
                num_beams=1,
                stopping_criteria=[note],
            )
            _wait(model)
            ended = clock()
        if len(calls) != 1 + TOKENS:  # each call makes one token for every row
            raise RuntimeError(f"{policy} made {len(calls)} tokens, expected {1 + TOKENS}")
        return (ended - calls[0]) / TOKENS

    found: dict[str, list[float]] = {name: [] for name in named}
    for repetition in range(repetitions + 1):
        for name, policy in named.items():
            seconds = lap(policy)
            if repetition:  # the first one warms up
                found[name].append(seconds)
    return found


def ratios(found: Mapping[str, Sequence[float]], to: str) -> dict[str, tuple[float, float, float]]:
    """Return median and quartiles of the ratio to one of the policies, by name."""
    by_name = {}
    for name, times in found.items():
        shares = [one / other for one, other in zip(times, found[to], strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        by_name[name] = middle, low, high
    return by_name


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main(say: Callable[[str], None] = print) -> None:
    """Print milliseconds per token and ratios."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", help="folder of a Whisper model")
    options.add_argument("--sound", help="a recording (WAV or FLAC) for that model")
    options.add_argument("--tiny", choices=("BART", "Whisper", "Mllama"), help="a tiny model instead")
    options.add_argument("--contrast", action="store_true")
    options.add_argument("--device", default="cpu")
    options.add_argument("--ratio", type=float, default=0.1)
    options.add_argument("--repetitions", type=int, default=9)
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.model:
        model, inputs = whisper(given.model, given.sound)
    elif given.tiny:
        model, inputs = tiny(given.tiny)
    else:
        model, inputs = wide_mllama(given.device), wide_inputs(given.device)
    model = model.to(given.device)
    inputs = {name: tensor.to(given.device) for name, tensor in inputs.items()}
    named = contrasts(model, given.ratio) if given.contrast else policies(given.ratio)
    found = measure(model, inputs, named, given.repetitions)
    shares = {to: ratios(found, to) for to in ("prefill", "full") if to in named}
    for name, times in found.items():
        cells = [
            f"x{middle:.3f} [{low:.3f}, {high:.3f}] of {to}"
            for to in shares
            for middle, low, high in [shares[to][name]]
        ]
        say(f"{name:<14} {1000 * statistics.median(times):8.3f} ms per token  {'  '.join(cells)}")


if __name__ == "__main__":
    main()
