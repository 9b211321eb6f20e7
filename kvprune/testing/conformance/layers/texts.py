"""What a policy answers about the text of one self-attention layer: KV01, KV10.

Nothing here trusts the core's own checks. Policies that prune no text pass.
"""

from __future__ import annotations

import dataclasses

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.text_view import TextView
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.cutting import cut_text
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import kept_sets, same_by_head
from kvprune.tokens.selection import Selection

__all__ = ["check_text", "check_text_alone"]


def _ask(policy: CrossKVPolicy, text: TextView) -> Selection | None:
    with torch.no_grad():
        return policy.select_text(text)


def check_text(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV01: real entries, the last row's own among them, equally many in all heads and layers.

    And KV10: the same again, and nothing of the view is written to.
    """
    if "text_cache" not in policy.needs:
        return
    counts: list[list[int]] = []
    for rank in range(problem.num_layers):
        text = dataclasses.replace(problem, rank=rank).text(policy.name)
        versions = {name: getattr(text, name)._version for name in ("queries", "keys", "values", "real")}
        selection = _ask(policy, text)
        if any(getattr(text, name)._version != version for name, version in versions.items()):
            raise Violation("no writing to the text view (KV10)", f"select_text wrote at rank {rank}")
        if selection != _ask(policy, dataclasses.replace(problem, rank=rank).text(policy.name)):
            raise Violation("the same selection of text again (KV10)", f"another one at rank {rank}")
        if selection is None:
            counts.append([text.entries] * text.batch)
            continue
        if selection.columns != text.entries or selection.indices.shape[0] != text.batch:
            raise Violation(
                f"a selection out of {text.entries} text entries of {text.batch} samples (KV01)",
                f"one out of {selection.columns} of {selection.indices.shape[0]}",
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
        counts.append([len(heads[0]) for heads in kept_sets(selection)])
    if any(now != counts[0] for now in counts):
        raise Violation("as many text entries in each layer", f"{counts}")


def check_text_alone(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV10: a sample keeps alone the text that it keeps in a batch."""
    if "text_cache" not in policy.needs:
        return
    together = _ask(policy, problem.text(policy.name))
    for sample in range(len(problem.layouts)):
        text = problem.text(policy.name)
        first = text.real[sample].to(torch.uint8).argmax()
        alone = _ask(policy, cut_text(text, slice(sample, sample + 1), int(first)))
        if together is None or alone is None:
            if together is not alone:
                raise Violation(f"text of sample {sample} alone as in the batch", "one is None, one is not")
            continue
        in_batch = [{entry - int(first) for entry in kept} for kept in kept_sets(together)[sample]]
        if not same_by_head(in_batch, by_itself := kept_sets(alone)[0]):
            raise Violation(f"text of sample {sample} alone as in the batch, {in_batch}", f"{by_itself}")
