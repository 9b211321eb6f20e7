"""Text views of random numbers, and their attention in plain loops."""

from __future__ import annotations

import math

import torch

from kvprune.policy.text_view import TextView


def make_text(lengths=(3, 5), earlier=0, *, query_heads=4, kv_heads=2, seed=0, dtype=torch.float64):
    """A text view of left-padded samples, with some entries of earlier turns."""
    random = torch.Generator().manual_seed(seed)
    rows = max(lengths)
    real = torch.ones(len(lengths), rows + earlier, dtype=torch.bool)
    for sample, length in enumerate(lengths):
        if earlier:
            real[sample, : sample + 1] = False
            real[sample, earlier : earlier + rows - length] = False
        else:
            real[sample, : rows - length] = False

    def draw(heads, count):
        return torch.randn(len(lengths), heads, count, 4, generator=random, dtype=torch.float64).to(dtype)

    return TextView(
        queries=draw(query_heads, rows),
        keys=draw(kv_heads, rows + earlier),
        values=draw(kv_heads, rows + earlier),
        real=real,
        scaling=0.5,
        layer_idx=2,
        policy_name="test",
    )


def slow_row(text, sample, head, row, null_keys=0.0):
    """Attention of one row and query head by text entry, in plain floats; zero for rows of padding."""
    entries = text.keys.shape[2]
    position = entries - text.queries.shape[2] + row
    weights = [0.0] * entries
    real = text.real[sample].tolist()
    if not real[position]:
        return weights
    query = text.queries[sample, head, row].double().tolist()
    kv_head = head // (text.queries.shape[1] // text.keys.shape[1])
    exponentials = {}
    for entry in range(position + 1):
        if real[entry]:
            key = text.keys[sample, kv_head, entry].double().tolist()
            exponentials[entry] = math.exp(
                text.scaling * math.fsum(q * k for q, k in zip(query, key, strict=True))
            )
    total = null_keys + math.fsum(exponentials.values())
    for entry, value in exponentials.items():
        weights[entry] = value / total
    return weights
