"""Lets a model reconstruct what its encoder has read, to see which encoder tokens the decoder needs for it.

No text of the target's call plays a part, so the scores do not depend on the question. The text is that of a
text encoder's own tokens, or one that the model writes greedily with the full cache. Then the decoder reads
this text once, with the full cache, and the largest attention to each encoder token is its score, by layer
and KV head (KVzip, arXiv 2505.23416).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.reconstruction import Writing
from kvprune.engine.guidance import Guidance, Prompt
from kvprune.errors import GuideError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.nesting import parts
from kvprune.policy.reconstruction import Reconstruction
from kvprune.session.guide import BoundGuide, Guide, Passes, attended_tokens
from kvprune.session.guide_policies import OwnImages, PeakRecord

__all__ = ["BoundReconstruction"]


class BoundReconstruction(BoundGuide):
    """Ranks the encoder tokens of a model's prompts by the attention of a reconstruction.

    Args:
        target: Adapter of the model; may be attached.
        policy: A policy that needs "reconstruction", or has one among its options.
        most: Most tokens that the model writes, instead of what the policy says; for checks, which need no
            good text.

    Raises:
        UnsupportedModelError: If the model cannot reconstruct.
        GuideError: If parts of the policy ask for different reconstructions, or for guidance as well.
    """

    def __init__(self, target: ModelAdapter, policy: CrossKVPolicy, most: int | None = None) -> None:
        target.require_reconstruction()
        super().__init__(Guide(), target)
        self._request = _request_of(policy)
        if most is not None:
            self._request = replace(self._request, max_new_tokens=most)

    def _ask(
        self, prompt: Prompt, few: CrossKVPolicy | None, passes: Passes, *, length_normalised: bool
    ) -> Guidance:
        """Find or write the text, read it once, and note the largest attention."""
        context = self._target.context(prompt, self._request)
        passes.prompt_tokens = attended_tokens(context.prompt)
        notes = [context.note]
        if context.text is None or context.real is None:
            with self._under(OwnImages()) as manager:
                writing = self._adapter.write(context.prompt, self._request.max_new_tokens)
            passes.add(manager, writing.written, calls=writing.calls)
            text, real = writing.text, writing.written
            notes.append(self._note_of(writing))
        else:
            text, real = context.text, context.real
        record = PeakRecord()
        with self._under(record.policy()) as manager:
            self._adapter.replay(context.prompt, text, real)
        passes.add(manager, real)
        layers = record.layers(len(prompt.text))
        scores = torch.stack([layer.amax(1).to(layers[0].device) for layer in layers]).amax(0)  # [R, S]
        rows = context.prompt.text.shape[1] - 1 + real.sum(-1)  # [R]
        return Guidance(
            scores=scores,
            rows=rows,
            answer=text,
            written=real,
            layers=layers,
            note="; ".join(filter(None, notes)),
        )

    def _note_of(self, writing: Writing) -> str:
        """Return a warning if a text was cut."""
        if not writing.is_cut:
            return ""
        return (
            f"a reconstruction was cut at {writing.text.shape[1]} tokens (max_new_tokens="
            f"{self._request.max_new_tokens}), so encoder tokens that only its rest would need score low"
        )


def _request_of(policy: CrossKVPolicy) -> Reconstruction:
    """Return the reconstruction that a policy, or one among its options, asks for."""
    asked = {part.reconstructs_from for part in parts(policy) if "reconstruction" in part.needs}
    if len(asked) > 1:
        raise GuideError(
            f"parts of policy {policy.spec} ask for different reconstructions "
            f"({', '.join(map(str, asked))}); give them the same options"
        )
    if "guidance" in policy.needs:
        raise GuideError(
            f"policy {policy.spec} needs a guide and a reconstruction, and there can be only one of both"
        )
    return asked.pop()
