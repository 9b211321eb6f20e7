"""Which text tokens a policy keeps in one self-attention layer: KV01 and KV10.

Nothing here relies on the checks of `Selection` or of the engine. Policies that prune no text pass.
"""

from __future__ import annotations

import dataclasses

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.text_view import TextView
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.cutting import cut_text
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import kept_sets, same_by_head
from kvprune.tokens.selection import Selection

__all__ = ["check_text", "check_text_alone"]


def check_text(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV01: a policy keeps real entries, the last one among them, and equally many in all heads and layers.

    Also KV10: the answer can be repeated, and nothing of the view is written to.
    """
    if "text_cache" not in policy.needs:
        return
    counts: list[list[int]] = []  # by layer and sample
    for rank in range(problem.num_layers):
        layer = dataclasses.replace(problem, rank=rank)
        text = layer.text(policy.name)
        selection = _select_without_writing(policy, text, rank)
        if selection != _select(policy, layer.text(policy.name)):
            raise Violation("the same selection of text again (KV10)", f"another selection at rank {rank}")
        if selection is None:
            counts.append([text.entries] * text.batch)
            continue
        _require_entries(selection, text, rank)
        counts.append([len(heads[0]) for heads in kept_sets(selection)])
    if any(now != counts[0] for now in counts):
        raise Violation("the same number of text entries in each layer", f"{counts}")


def _select(policy: CrossKVPolicy, text: TextView) -> Selection | None:
    with torch.no_grad():
        return policy.select_text(text)


def _select_without_writing(policy: CrossKVPolicy, text: TextView, rank: int) -> Selection | None:
    """Return the policy's selection; raise if it wrote to the view."""

    def versions() -> list[int]:
        return [tensor._version for tensor in (text.queries, text.keys, text.values, text.real)]

    before = versions()
    selection = _select(policy, text)
    if versions() != before:
        raise Violation("no writing to the text view (KV10)", f"select_text wrote at rank {rank}")
    return selection


def _require_entries(selection: Selection, text: TextView, rank: int) -> None:
    """Raise unless each head keeps real entries, the last one, and as many as the other heads."""
    if selection.columns != text.entries or selection.indices.shape[0] != text.batch:
        raise Violation(
            f"a selection from {text.entries} text entries of {text.batch} samples (KV01)",
            f"one from {selection.columns} entries of {selection.indices.shape[0]} samples",
        )
    for sample, heads in enumerate(kept_sets(selection)):
        real = set(text.real[sample].nonzero().flatten().tolist())
        for head, kept in enumerate(heads):
            where = f"text of sample {sample}, head {head}, rank {rank}"
            if not kept <= real:
                raise Violation(f"{where} to keep real entries only", f"padding {sorted(kept - real)}")
            if max(real) not in kept:
                raise Violation(f"{where} to keep the last entry, {max(real)}", f"{sorted(kept)}")
            if len(kept) != len(heads[0]):
                raise Violation(f"{where} to keep as many as head 0, {len(heads[0])}", f"{len(kept)}")


def check_text_alone(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: a sample keeps alone the text that it keeps in a batch."""
    if "text_cache" not in policy.needs:
        return
    together = _select(policy, problem.text(policy.name))
    for sample in range(len(problem.layouts)):
        text = problem.text(policy.name)
        first = int(text.real[sample].to(torch.uint8).argmax())  # entries before it are left padding
        alone = _select(policy, cut_text(text, slice(sample, sample + 1), first))
        if together is None or alone is None:
            if together is not alone:
                raise Violation(f"text of sample {sample} alone as in the batch", "one is None, one is not")
            continue
        in_batch = [{entry - first for entry in kept} for kept in kept_sets(together)[sample]]
        if not same_by_head(in_batch, by_itself := kept_sets(alone)[0]):
            raise Violation(f"text of sample {sample} alone as in the batch, {in_batch}", f"{by_itself}")
