"""A model with its processor: encodes batches padded on the left, and decodes answers greedily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvprune.comparison.data.examples import Example, Question
from kvprune.comparison.data.pictures import read_picture
from kvprune.comparison.execution.loading import load_model
from kvprune.errors import DataError, UnsupportedModelError
from kvprune.text import error_line, shown

__all__ = ["Generator"]


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A model and its processor, ready to answer batches of questions about pictures.

    Args:
        model: A model with `generate` that an adapter supports.
        processor: A processor that has a chat template and can pad on the left.
        max_new_tokens: Limit on the length of an answer, in tokens.
    """

    model: Any
    processor: Any
    max_new_tokens: int

    @classmethod
    def load(
        cls,
        model: str | None,
        *,
        device: str,
        dtype: str,
        attn_implementation: str | None,
        max_new_tokens: int,
        trust_remote_code: bool = False,
    ) -> Generator:
        """Load a model and its processor, and check that kvprune supports the model.

        Args:
            model: Hub id or local folder; None is the embedded demo.
            device: A torch device such as ``cpu`` or ``cuda:0``.
            dtype: One of `DTYPES`.
            attn_implementation: Passed to transformers; None is its default.
            max_new_tokens: Limit on the length of an answer, in tokens.
            trust_remote_code: Let transformers run Python files that come with the model.

        Raises:
            UnsupportedModelError: If the model cannot be loaded, needs code of its own, has no adapter, or
                its processor has no chat template.
        """
        from kvprune.session.registry import find_adapter

        loaded, processor = load_model(
            model,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        find_adapter(loaded)
        if not getattr(processor, "chat_template", None):
            raise UnsupportedModelError(
                f"the processor of {model!r} has no chat template; use an instruction-tuned checkpoint"
            )
        return cls(model=loaded.eval(), processor=processor, max_new_tokens=max_new_tokens)

    def check_questions(self, examples: Sequence[Example]) -> None:
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

    def generate(self, inputs: Mapping[str, Any], tokens: int | None = None) -> torch.Tensor:
        """Return new tokens, int64 ``[B, new]``, decoded greedily.

        Args:
            inputs: What `encode` returned.
            tokens: Exact number of new tokens to generate; None lets the model end its answers.
        """
        length = {"max_new_tokens": self.max_new_tokens}
        if tokens is not None:
            length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.inference_mode():
            out = self._decode(inputs, **length)
        new: torch.Tensor = out[:, inputs["input_ids"].shape[1] :]
        return new

    def _decode(self, inputs: Mapping[str, Any], **options: Any) -> Any:
        # Sampling options of a checkpoint's generation config would only cause warnings here.
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        return self.model.generate(**inputs, **options, **greedy)

    def texts(self, new: torch.Tensor) -> list[str]:
        """Return the answers as text, without special tokens.

        Args:
            new: New tokens, int64 ``[B, new]``.
        """
        decoded: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    def finished(self, new: torch.Tensor) -> list[bool]:
        """Return for each answer whether the model ended it itself, and not the limit on new tokens.

        Args:
            new: New tokens, int64 ``[B, new]``.
        """
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or []), device=new.device)
        done: list[bool] = torch.isin(new, ends).any(-1).tolist()
        return done


def _special_tokens(processor: Any) -> list[str]:
    """Return the texts that a processor's tokenizer reads as special tokens, wherever they stand."""
    tokenizer = getattr(processor, "tokenizer", processor)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {str(token) for token in added if getattr(token, "special", False)}
    found |= {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
    found |= {token for token in (getattr(processor, "image_token", None),) if isinstance(token, str)}
    return sorted(found - {""})
