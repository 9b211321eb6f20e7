"""Lessons from a file of recordings, the same kind of file that `kvprune compare` reads.

Each recording goes through the encoder once, in the beginning. Its features stay in memory in half precision,
and so does what the model predicts from them with all tokens: about 4 MB for a sentence of Whisper base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvprune.comparison.data.examples import Example, Utterance
from kvprune.engine.guidance import Prompt
from kvprune.errors import TrainingError
from kvprune.text import shown
from kvprune.training.distillation import read_in_full
from kvprune.training.file_lessons import FileLessons
from kvprune.training.lessons import FullReading, Lesson, answer_tensors, prompt_of

__all__ = ["SpeechLessons"]


class SpeechLessons(FileLessons):
    """Lessons about recordings that a Whisper writes down; see `FileLessons`.

    Each recording is read alone, so what a lesson holds does not depend on how recordings were batched.
    """

    _known: dict[str, Lesson]  # of one row, by the digest of its recording, in half precision

    def _encoded(self, examples: Sequence[Example]) -> Lesson:
        """Return a batch of recordings that have been read."""
        rows = [self._known[example.digest] for example in examples]
        model = self._generator.model

        def batched(tensors: Sequence[Tensor]) -> Tensor:
            joined = torch.cat(list(tensors))
            return joined.to(model.dtype) if joined.is_floating_point() else joined

        arguments = {
            name: batched([row.prompt.arguments[name] for row in rows]) for name in rows[0].prompt.arguments
        }
        states = batched([row.prompt.states for row in rows if row.prompt.states is not None])  # [R, S, C]
        answers = [self._answers[example.digest] for example in examples]
        tokens, written = answer_tensors(answers, states.device)
        full = [row.full for row in rows if row.full is not None]
        longest = tokens.shape[1]
        outputs = zip(*(one.outputs for one in full), strict=True)
        reading = FullReading(
            _padded([one.logits for one in full], longest),
            tuple(_padded(layer, longest) for layer in outputs),
        )
        return Lesson(Prompt(arguments, states), tokens, written, reading)

    def _answered(self, on_progress: Callable[[int, int], None]) -> Mapping[str, list[int]]:
        """Read all recordings; return the tokens of their transcripts, with the token that ends them."""
        examples = (*self._learning, *self._validation)
        self._require_one_window(examples)
        self._known, answers = {}, {}
        for example in examples:
            answers[example.digest], self._known[example.digest] = self._read(example)
            on_progress(len(answers), len(examples))
        return answers

    def _read(self, example: Example) -> tuple[list[int], Lesson]:
        """Return the transcript of a recording, and a lesson of it alone."""
        generator = self._generator
        with prompt_of(self._adapter) as prompts:
            new = generator.generate(
                generator.encode([example]), limit=None if self._kind == "full" else 1
            )  # [1, n]
        (prompt,) = prompts
        assert prompt.states is not None
        answer = self._said(example) if self._kind == "data" else self._heard(new)
        # Tensors of inference mode take no part in training; copies do.
        arguments = {name: tensor.clone() for name, tensor in prompt.arguments.items()}
        states = prompt.states.clone()  # [1, S, C]
        half = states.half()
        if bool(half.isfinite().all()):
            states = half
        tokens, written = answer_tensors([answer], states.device)
        model = generator.model
        lesson = Lesson(Prompt(arguments, states.to(model.dtype)), tokens, written)
        full = read_in_full(self._adapter, lesson, outputs=True)
        reading = FullReading(
            full.logits.float().log_softmax(-1).half(), tuple(layer.half() for layer in full.outputs)
        )
        return answer, Lesson(Prompt(arguments, states), tokens, written, reading)

    def _heard(self, new: Tensor) -> list[int]:
        """Return the transcript that the model wrote, int64 ``[1, n]``, with its end if it has one."""
        (length,) = self._generator.lengths(new)
        written: list[int] = new[0, :length].tolist()
        return written + self._end if length < self._generator.max_new_tokens else written

    def _said(self, example: Example) -> list[int]:
        """Return the tokens of the text that was spoken; a transcript of Whisper begins with a blank."""
        text = f" {example.answers[0].strip()}"
        tokens: list[int] = self._generator.processor.tokenizer(text, add_special_tokens=False).input_ids
        return tokens + self._end

    @property
    def _end(self) -> list[int]:
        end: Any = self._generator.model.generation_config.eos_token_id
        return [end if isinstance(end, int) else end[0]]

    def _require_one_window(self, examples: Sequence[Example]) -> None:
        """Raise if a recording is longer than what the model hears at once."""
        window = float(self._generator.processor.feature_extractor.chunk_length)
        for example in examples:
            assert isinstance(example, Utterance)
            if example.seconds > window:
                raise TrainingError(
                    f"example {shown(example.id, 80)} lasts {example.seconds:.2f} s, but training reads "
                    f"recordings of at most {window:g} s, which the model hears at once; cut it at pauses, "
                    "or leave it out"
                )


def _padded(tensors: Sequence[Tensor], longest: int) -> Tensor:
    """Return tensors ``[1, n, X]`` as one, ``[R, longest, X]``, with zeros after the end of each."""
    rows = [torch.nn.functional.pad(tensor, (0, 0, 0, longest - tensor.shape[1])) for tensor in tensors]
    return torch.cat(rows)
