"""Asks a model questions about pictures: encodes batches padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvprune.comparison.data.examples import Example, Question, is_correct
from kvprune.comparison.data.pictures import read_picture
from kvprune.comparison.execution.first_token import criteria
from kvprune.comparison.execution.generation import Generator, Measured
from kvprune.comparison.plan.settings import PICTURE_TOKENS
from kvprune.comparison.storage.answers import Answer
from kvprune.errors import DataError, UnsupportedModelError
from kvprune.text import error_line, shown

__all__ = ["PictureGenerator"]


@dataclass(frozen=True, kw_only=True)
class PictureGenerator(Generator):
    """A model of pictures and text; its processor has a chat template and can pad on the left."""

    kind = "pictures"

    @classmethod
    def check_model(cls, name: str, model: Any, processor: Any, max_new_tokens: int | None) -> int:
        """Return the limit on new tokens; raise if the processor has no chat template."""
        if not getattr(processor, "chat_template", None):
            raise UnsupportedModelError(
                f"the processor of {name!r} has no chat template; use an instruction-tuned checkpoint"
            )
        return PICTURE_TOKENS if max_new_tokens is None else max_new_tokens

    def check(self, examples: Sequence[Example]) -> None:
        """Raise unless every question is plain text for the model: it holds none of its special tokens.

        A question with the token that stands for a picture cannot be encoded, and one with the token that
        ends a turn would change the prompt that the chat template makes.

        Raises:
            DataError: With the example and the token.
        """
        special = _special_tokens(self.processor)
        for example in examples:
            assert isinstance(example, Question)
            found = [token for token in special if token in example.question]
            if found:
                raise DataError(
                    f"the question of example {shown(example.id, 80)} contains {shown(max(found, key=len))}, "
                    "which this model reads as a special token and not as text; write the question without it"
                )

    def encode(self, examples: Sequence[Example]) -> Mapping[str, Any]:
        """Return the model's inputs for a batch of prompts, each one user turn: a picture, then its question.

        Raises:
            DataError: If a picture cannot be read, the processor cannot encode a prompt, or it pads on the
                right.
        """
        self.encoder.forget()
        images, prompts = [], []
        for example in examples:
            assert isinstance(example, Question)
            images.append([read_picture(example.file)[0]])
            content = [{"type": "image"}, {"type": "text", "text": example.question}]
            turn = [{"role": "user", "content": content}]
            prompts.append(self.processor.apply_chat_template(turn, add_generation_prompt=True))
        try:
            inputs = self.processor(
                images=images,
                text=prompts,
                padding=True,
                padding_side="left",
                add_special_tokens=False,  # the chat template has added them
                return_tensors="pt",
            )
        except (TypeError, ValueError, IndexError) as error:  # how processors refuse what they are given
            ids = ", ".join(shown(example.id, 80) for example in examples[:4])
            raise DataError(
                f"the processor cannot encode the questions and pictures of the examples {ids}"
                f"{', ...' if len(examples) > 4 else ''}: {error_line(error)}"
            ) from error
        inputs = inputs.to(self.model.device, self.model.dtype)
        used = inputs["attention_mask"]
        if not bool(used[:, -1].all()):
            raise DataError(
                "the processor does not pad on the left, so batched answers would be wrong; "
                "use --batch-size 1"
            )
        return dict(inputs)

    def generate(
        self,
        inputs: Mapping[str, Any],
        tokens: int | None = None,
        *,
        limit: int | None = None,
        caps: Sequence[int] = (),
        on_first: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Return new tokens, int64 ``[B, new]``; see `Generator.generate`."""
        length = {"max_new_tokens": self.max_new_tokens if limit is None else limit}
        if tokens is not None:
            length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        # Sampling options of a checkpoint's generation config would only cause warnings here.
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        with torch.inference_mode():
            out = self.model.generate(**inputs, **length, **greedy, **criteria(on_first))
        new: torch.Tensor = out[:, inputs["input_ids"].shape[1] :]
        return new

    def judge(self, example: Example, measured: Measured, *, tokens: int, cap: int) -> Answer:
        """Return the answer: right if it equals one of the right ones."""
        return Answer(**measured, correct=is_correct(measured["answer"], example.answers))


def _special_tokens(processor: Any) -> list[str]:
    """Return the texts that a processor's tokenizer reads as special tokens, wherever they stand."""
    tokenizer = getattr(processor, "tokenizer", processor)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {str(token) for token in added if getattr(token, "special", False)}
    found |= {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
    found |= {token for token in (getattr(processor, "image_token", None),) if isinstance(token, str)}
    return sorted(found - {""})
