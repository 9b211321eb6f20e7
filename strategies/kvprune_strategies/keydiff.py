"""`keydiff`: the tokens whose keys are least similar to the other keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring


@dataclass(frozen=True, kw_only=True)
class KeyDiff(ScoringPolicy):
    """Keep the tokens whose keys point away from the mean direction of all keys.

    In each KV head, the anchor is the mean of the keys, each divided by its length. A token's score is minus
    the cosine between its key and the anchor. Queries do not matter, so the same tokens stay whatever the
    question.
    """

    name = "keydiff"
    version = 1

    def score(self, view: LayerView) -> Tensor:
        """Return minus the cosine to the anchor ``[B, Hkv, S]``, 0 for unseen columns."""
        dtype = scoring.accumulation_dtype(view.keys)
        scores = torch.zeros(view.keys.shape[:3], dtype=dtype, device=view.keys.device)  # [B, Hkv, S]
        for members in scoring.each_stratum(view.strata):  # [B, S]
            for sample in range(view.batch):
                # Gathered, so that rounding does not depend on the padding of the batch (KV10).
                columns = members[sample].nonzero().squeeze(1)  # [n]
                if len(columns):
                    scores[sample][:, columns] = -_cosine_to_mean(view.keys[sample][:, columns].to(dtype))
        return scores

    fidelity = "adapted"
    paper = "arXiv 2504.15364 (KeyDiff)"
    deviations = """
    All tokens arrive at once, so there is one pass over all of them. The original evicts in blocks of the
    prompt, and compares keys with those that are left; kvpress has blocks of 128 tokens. On the keys of
    Whisper base (1500 tokens), these blocks and one pass share 0.71, 0.72 and 0.68 of the tokens that either
    keeps, at a half, a quarter and a tenth. The mean is over what decoding can see; an image of an
    interleaved chat that only earlier rows see has an anchor of its own.
    """
    differs = (
        "one pass over all tokens; the original evicts block by block, which keeps other tokens where "
        "several blocks evict"
    )
    checked_against = (
        "same sets as NVIDIA/kvpress@8bb29b9 (KeyDiffPress), a port: the authors' code was not found; "
        "with its blocks only where one block evicts"
    )
    cost = (
        "two passes over keys and one float32 copy of one sample's; no attention weights; one host "
        "synchronisation for each sample and image"
    )
    bibtex = """
@article{keydiff2025,
  title = {{KeyDiff}: Key Similarity-Based {KV} Cache Eviction for Long-Context {LLM} Inference in
           Resource-Constrained Environments},
  author = {Park, Junyoung and others},
  year = {2025},
  eprint = {2504.15364},
  archivePrefix = {arXiv},
}
"""


def _cosine_to_mean(keys: Tensor) -> Tensor:
    """Return each key's cosine to its head's mean direction, ``[H, n]``; overwrites keys ``[H, n, D]``."""
    # By the largest entry first: squares of very large or small numbers leave the range of float32.
    for order in (torch.inf, 2):
        lengths = torch.linalg.vector_norm(keys, ord=order, dim=-1, keepdim=True)  # [H, n, 1]
        keys.div_(torch.where(lengths == 0, 1, lengths))
    anchor = keys.mean(1, keepdim=True)  # [H, 1, D]
    length = torch.linalg.vector_norm(anchor, dim=-1, keepdim=True)
    anchor = anchor / torch.where(length == 0, 1, length)
    return keys.mul_(anchor).sum(-1)
