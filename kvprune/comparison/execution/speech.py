"""Lets a Whisper write down recordings, greedily.

A recording that fits in the model's window (30 seconds in the published models) is read at once, without
timestamps. A longer one is read window by window: where the timestamps of a window end, the next one begins.
Each window is a prefill, and the policy decides about it anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvprune.adapters.families.whisper_text import normaliser
from kvprune.comparison.data.audio import read_audio, resampled
from kvprune.comparison.data.examples import Example, Utterance
from kvprune.comparison.execution.enough import Enough
from kvprune.comparison.execution.first_token import criteria
from kvprune.comparison.execution.generation import Generator, Measured
from kvprune.comparison.execution.quiet import without_warnings
from kvprune.comparison.execution.transcripts import count_errors, repeats
from kvprune.comparison.storage.answers import Transcript
from kvprune.errors import DataError, KVPruneError, UnsupportedModelError
from kvprune.text import shown

__all__ = ["SpeechGenerator"]

_PROMPT = 4
"""Tokens of the prompt: start, language, task, no timestamps. Models for English alone have two of them."""


@dataclass(frozen=True, kw_only=True)
class SpeechGenerator(Generator):
    """A Whisper with its feature extractor and tokenizer."""

    kind = "speech"
    packages = ("jiwer", "soundfile", "soxr")

    @classmethod
    def check_model(cls, name: str, model: Any, processor: Any, max_new_tokens: int | None) -> int:
        """Return the limit on new tokens: by default, what is left of the decoder's positions.

        Raises:
            UnsupportedModelError: If the model is no Whisper, does not say which languages it knows, or has
                not as many positions as were asked for.
        """
        config = model.generation_config
        if getattr(model.config, "model_type", None) != "whisper" or not hasattr(
            processor, "feature_extractor"
        ):
            raise UnsupportedModelError(
                f"cannot transcribe with {name!r}: it is a {type(model).__name__} with a "
                f"{type(processor).__name__}; speech needs a Whisper with its feature extractor and tokenizer"
            )
        if getattr(config, "is_multilingual", True) and not getattr(config, "lang_to_id", None):
            raise UnsupportedModelError(
                f"cannot transcribe with {name!r}: its generation_config.json does not list languages "
                "(lang_to_id); take that file from the same model in a newer version"
            )
        if getattr(config, "no_timestamps_token_id", None) is None:
            raise UnsupportedModelError(
                f"cannot transcribe with {name!r}: its generation_config.json does not name the token for "
                "transcripts without timestamps (no_timestamps_token_id); take that file from the same model "
                "in a newer version"
            )
        most = _most_tokens(model)
        if max_new_tokens is not None and max_new_tokens > most:
            raise UnsupportedModelError(
                f"max_new_tokens is {max_new_tokens}, but {name!r} can write at most {most} tokens"
            )
        return most if max_new_tokens is None else max_new_tokens

    def check(self, examples: Sequence[Example]) -> None:
        """Raise unless the model knows the language of each recording, and can tell time if one is long.

        Raises:
            DataError: With the example, and what would be right.
        """
        known = self._languages
        for example in examples:
            assert isinstance(example, Utterance)
            if example.language not in known:
                raise DataError(
                    f"example {shown(example.id, 80)} is in the language {example.language!r}, which this "
                    f"model does not know; it knows: {', '.join(known)}"
                )
            if self._windows_of(example) > 1 and self._last_time <= self._first_time:
                raise DataError(
                    f"example {shown(example.id, 80)} lasts {example.seconds:.2f} s, more than the "
                    f"{self._window:g} s that this model hears at once, and the model has no timestamps, by "
                    "which it would find the next window; cut the recording at a pause"
                )

    @property
    def _window(self) -> float:
        """Seconds that the model hears at once."""
        return float(self.processor.feature_extractor.chunk_length)

    def _windows_of(self, example: Example) -> int:
        """Return how many windows a recording fills; how many the model reads depends on its timestamps."""
        assert isinstance(example, Utterance)
        return max(1, math.ceil(example.seconds / self._window))

    def most_tokens(self, example: Example) -> int:
        """Return the limit on a transcript: that of one window for each window that the recording fills."""
        return self.max_new_tokens * self._windows_of(example)

    @property
    def _first_time(self) -> int:
        """The first token that says a time; all tokens after it do, too."""
        return int(self.model.generation_config.no_timestamps_token_id) + 1

    @property
    def _last_time(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def _languages(self) -> list[str]:
        """Codes of the languages that the model knows."""
        if not self._is_multilingual:
            return ["en"]
        return sorted(name.strip("<|>") for name in self.model.generation_config.lang_to_id)

    @property
    def _is_multilingual(self) -> bool:
        return bool(getattr(self.model.generation_config, "is_multilingual", True))

    def encode(self, examples: Sequence[Example]) -> Mapping[str, Any]:
        """Return features and options for a batch of recordings; all prompts have the same length.

        Raises:
            DataError: If a recording cannot be read.
        """
        self.encoder.forget()
        is_long = any(self._windows_of(example) > 1 for example in examples)
        extractor = self.processor.feature_extractor
        samples, languages = [], []
        for example in examples:
            assert isinstance(example, Utterance)
            samples.append(resampled(read_audio(example.file), extractor.sampling_rate))
            languages.append(example.language)
        features = extractor(
            samples,
            sampling_rate=extractor.sampling_rate,
            return_attention_mask=True,
            return_tensors="pt",
            **({"truncation": False, "padding": "longest"} if is_long else {}),
        )
        inputs = dict(features.to(self.model.device, self.model.dtype))
        if not self._is_multilingual:
            return inputs
        same = len(set(languages)) == 1
        return {**inputs, "language": languages[0] if same else languages, "task": "transcribe"}

    def generate(
        self,
        inputs: Mapping[str, Any],
        tokens: int | None = None,
        *,
        limit: int | None = None,
        caps: Sequence[int] = (),
        on_first: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Return new tokens without the prompt and the token that ends a transcript, int64 ``[B, new]``.

        Args:
            inputs: What `encode` returned.
            tokens: Exact number of new tokens; the token that ends a transcript is suppressed. Of long
                recordings, only the first window is read then.
            limit: Most new tokens; None is `max_new_tokens`. Of long recordings, each window is limited to
                `max_new_tokens` instead, so that no window depends on the other recordings of a batch.
            caps: Where each transcript will be cut; only long recordings need it.
            on_first: Called once, when the first new token of the batch is there.

        Raises:
            KVPruneError: If the model cannot write that many tokens.
        """
        frames = int(self.processor.feature_extractor.nb_max_frames)
        if inputs["input_features"].shape[-1] > frames:
            if tokens is None:
                return self._long(inputs, caps or [self.max_new_tokens] * len(inputs["input_features"]))
            cut = ("input_features", "attention_mask")
            inputs = {**inputs, **{name: inputs[name][..., :frames] for name in cut}}
        length = {"max_new_tokens": self.max_new_tokens if limit is None else limit}
        if tokens is not None:
            most = _most_tokens(self.model)
            if tokens > most:
                raise KVPruneError(
                    f"{tokens} new tokens are asked for, but the model can write at most {most}"
                )
            length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        # One temperature, so Whisper has nothing to fall back to if it does not trust a transcript.
        with torch.inference_mode(), without_warnings():
            found: torch.Tensor = self.model.generate(
                **inputs,
                **length,
                **criteria(on_first),
                return_timestamps=False,
                # A model that lost what it needs may write timestamps all the same. `generate` would then
                # decode the rest of that recording in another call, with another cache and decision.
                force_unique_generate_call=True,
                do_sample=False,
                num_beams=1,
                temperature=None,
            )
        return self._new_tokens(found)

    def _long(self, inputs: Mapping[str, Any], caps: Sequence[int]) -> torch.Tensor:
        """Return the transcripts of recordings that are read window by window, without their timestamps.

        One temperature and no text of earlier windows in the prompt: nothing is tried again, and a loop in
        one window does not spread to the next. Writing ends where twice as many tokens were written as a
        transcript may have, timestamps and what Whisper throws away included.
        """
        padding = int(self.model.generation_config.pad_token_id)
        enough = Enough([2 * cap for cap in caps], padding)
        from transformers import StoppingCriteriaList  # slow to import

        with torch.inference_mode(), without_warnings():
            found: torch.Tensor = self.model.generate(
                **inputs,
                stopping_criteria=StoppingCriteriaList([enough]),
                monitor_progress=enough.begin_window,
                max_new_tokens=self.max_new_tokens,
                return_timestamps=True,
                condition_on_prev_tokens=False,
                do_sample=False,
                num_beams=1,
                temperature=None,
            )
        ends = torch.as_tensor(self.model.generation_config.eos_token_id, device=found.device)
        text = [row[(row < self._first_time) & ~torch.isin(row, ends) & (row != padding)] for row in found]
        return torch.nn.utils.rnn.pad_sequence(text, batch_first=True, padding_value=padding)  # [B, new]

    def _new_tokens(self, sequences: torch.Tensor) -> torch.Tensor:
        """Return what stands after the prompt; the token that ends a transcript counts as padding."""
        config = self.model.generation_config
        prompt = int((sequences[0] == config.no_timestamps_token_id).nonzero()[0]) + 1
        new = sequences[:, prompt:]  # [B, new]
        ends = torch.as_tensor(config.eos_token_id, device=new.device)
        return new.masked_fill(torch.isin(new, ends), config.pad_token_id)

    def lengths(self, new: torch.Tensor) -> list[int]:
        """Return the length of each transcript in tokens; Whisper pads where it has ended."""
        lengths: list[int] = (new != self.model.generation_config.pad_token_id).sum(-1).tolist()
        return lengths

    def judge(self, example: Example, measured: Measured, *, tokens: int, cap: int) -> Transcript:
        """Return the transcript with its errors; no word is wrong if it is correct."""
        assert isinstance(example, Utterance)
        spelling = getattr(self.processor.tokenizer, "english_spelling_normalizer", None)
        normalise = normaliser(example.language, spelling)
        errors = count_errors(normalise(example.reference), normalise(measured["answer"]))
        return Transcript(
            **measured,
            correct=errors.word_errors == 0,
            word_errors=errors.word_errors,
            words=errors.words,
            character_errors=errors.character_errors,
            characters=errors.characters,
            tokens=tokens,
            cap=cap,
            loops=repeats(measured["answer"], is_long=self._windows_of(example) > 1),
        )


def _most_tokens(model: Any) -> int:
    """Return how many tokens a model can write after its prompt."""
    return int(model.config.max_target_positions) - _PROMPT
