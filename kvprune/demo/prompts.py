"""Prompts: questions in the chat template, and rows of several questions with answers for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvprune.demo.tasks import Query

if TYPE_CHECKING:
    from transformers import ProcessorMixin

IGNORED = -100
"""Label of a token that the loss ignores."""


@dataclass(frozen=True)
class Packed:
    """Independent questions about each picture with their answers, packed into one row per picture.

    No question sees another one, and each starts at position 0, so each is read as if it were alone.

    Attributes:
        input_ids: int64 [B, T], padded on the right.
        position_ids: int64 [B, T], counted from 0 in each question.
        labels: int64 [B, T], `input_ids` at the tokens of an answer and its end, `IGNORED` elsewhere.
        attention_mask: bool [B, 1, T, T], which token sees which.
        cross_attention_mask: int64 [B, T, 1, 4], which token sees which tile.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    cross_attention_mask: torch.Tensor


def chat(question: str) -> list[dict[str, Any]]:
    """Return a conversation of one user turn: a picture and a question about it."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def prompt(processor: ProcessorMixin, question: str) -> str:
    """Return the text that the processor gets together with a picture."""
    return str(processor.apply_chat_template(chat(question), add_generation_prompt=True))


def pack(processor: ProcessorMixin, queries: Sequence[Sequence[Query]]) -> Packed:
    """Tokenise questions with their answers for training.

    Args:
        processor: Processor with the chat template and the tokenizer.
        queries: The questions about each picture, which has four tiles.
    """
    tokenizer: Any = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids("<|image|>")
    # The template is filled in once, not for each question.
    before, after = prompt(processor, "\0").split("\0")
    flat = [query for asked in queries for query in asked]
    heads = tokenizer([f"{before}{query.question}{after}" for query in flat]).input_ids
    tails = tokenizer([query.answer for query in flat]).input_ids
    pairs = iter(zip(heads, tails, strict=True))
    texts = [[next(pairs) for _ in asked] for asked in queries]
    longest = max(sum(len(head) + len(tail) + 1 for head, tail in row) for row in texts)
    shape = (len(texts), longest)
    input_ids = torch.full(shape, tokenizer.pad_token_id)
    position_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    owner = torch.full(shape, -1)  # number of the question that a token belongs to; -1 for padding
    cross = torch.zeros(*shape, 1, 4, dtype=torch.long)
    for row, questions in enumerate(texts):
        start = 0
        for number, (head, tail) in enumerate(questions):
            tail = [*tail, tokenizer.eos_token_id]
            answer, end = start + len(head), start + len(head) + len(tail)
            input_ids[row, start:end] = torch.tensor(head + tail)
            position_ids[row, start:end] = torch.arange(end - start)
            labels[row, answer:end] = torch.tensor(tail)
            owner[row, start:end] = number
            cross[row, start + head.index(image_id) : end, 0] = 1
            start = end
    together = (owner[:, :, None] == owner[:, None, :]).tril()  # [B, T, T]
    return Packed(input_ids, position_ids, labels, together[:, None], cross)
