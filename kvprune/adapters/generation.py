"""What `generate` is doing when it calls a model: how often it repeats samples, and which rows are drafts.

A forward call does not say whether equal rows are beams of one sample, or whether its last rows are draft
tokens that it verifies. `generate` knows both, and it is still running while the model is called, so it is
looked up on the call stack of this thread. A note taken by a hook would not do: it outlives an interrupted
call, is read by another thread, or is used up by the draft's own prefill.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType
from typing import Any

from torch import nn

from kvprune.adapters.probes import Probe
from kvprune.errors import UnsupportedModelError

__all__ = ["Generation", "probe_generation", "running_generation"]

_READ = {"generate": ("generation_config", "input_ids"), "_assisted_decoding": ("candidate_length",)}
"""Methods of ``GenerationMixin``, and their local variables that are read."""


@dataclass(frozen=True)
class Generation:
    """What `generate` has told about the call that runs now.

    Args:
        repeats: Consecutive rows of the batch that `generate` has made from one sample: its beams or return
            sequences.
        drafts: Number of draft tokens at the end of the call's text, in assisted decoding.
        chunk: Text rows to which `generate` limits each call of the prefill; None for no limit.
    """

    repeats: int = 1
    drafts: int = 0
    chunk: int | None = None

    def require_whole_prompt(self, family: str) -> None:
        """Raise if the prompt arrives in chunks: policies would see the first one only.

        Raises:
            UnsupportedModelError: Names the option.
        """
        if self.chunk is not None:
            raise UnsupportedModelError(
                f"prefill_chunk_size={self.chunk} passes the prompt of {family} in chunks, and only the "
                "first one comes with encoder states, so a policy would decide without the rest of the "
                "prompt; leave prefill_chunk_size out"
            )


def running_generation(model: nn.Module) -> Generation:
    """Return what the innermost `generate` of a model, or of a model that contains it, is doing.

    `Generation()` if the model was called by hand. In self-speculative decoding the model drafts in a
    `generate` of its own, which verifies nothing.
    """
    codes = _codes()
    drafts = 0
    for frame in _callers():
        method = codes.get(frame.f_code)
        if method is None or not _contains(frame.f_locals.get("self"), model):
            continue
        if method == "_assisted_decoding":
            drafts = int(frame.f_locals.get("candidate_length", 0))
            continue
        options, prompt = frame.f_locals["generation_config"], frame.f_locals["input_ids"]
        chunk = getattr(options, "prefill_chunk_size", None)
        return Generation(
            repeats=max(options.num_beams or 1, options.num_return_sequences or 1),
            drafts=drafts,
            chunk=chunk if chunk is not None and chunk < prompt.shape[1] else None,
        )
    return Generation()


def probe_generation() -> Probe:
    """Check that the methods of transformers have the local variables that are read."""
    missing = [
        f"{method}: {name}"
        for code, method in _codes().items()
        for name in ("self", *_READ[method])
        if name not in code.co_varnames + code.co_cellvars
    ]
    missing += [method for method in _READ if method not in _codes().values()]
    detail = f"lacks {', '.join(missing)}" if missing else "has what tells beams and draft tokens"
    return Probe("GenerationMixin", not missing, detail)


def _callers() -> Iterator[FrameType]:
    """Yield the frames of this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _contains(outer: Any, model: nn.Module) -> bool:
    return outer is model or (
        isinstance(outer, nn.Module) and any(module is model for module in outer.modules())
    )


@cache
def _codes() -> dict[CodeType, str]:
    """Return the code of each method that is looked for, without its decorators."""
    from transformers import GenerationMixin  # slow to import

    found = {}
    for name in _READ:
        method = inspect.unwrap(getattr(GenerationMixin, name, None) or (lambda: None))
        code = getattr(method, "__code__", None)
        if code is not None and code.co_name == name:
            found[code] = name
    return found
