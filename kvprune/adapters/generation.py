"""What `generate` is doing when it calls a model, and how assisted decoding begins.

A forward call does not say whether equal rows are beams of one sample. `generate` knows, and it is still
running while the model is called, so its local variables are read.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from kvprune.adapters.probes import Probe
from kvprune.errors import UnsupportedModelError

__all__ = [
    "CANDIDATES",
    "WHY_EAGER",
    "Generation",
    "callers",
    "probe_generation",
    "prompt_first",
    "running_generation",
]

CANDIDATES = "_get_candidate_generator"
"""Method of ``GenerationMixin`` that assisted decoding calls once, before it asks for draft tokens."""

WHY_EAGER = "kvprune: a policy decides in this call by what it measures; compile decode steps alone"
"""Why `running_generation` is called outside of compiled code."""

_READ = "self", "generation_config", "input_ids"
"""Local variables of ``GenerationMixin.generate`` that are read."""


@dataclass(frozen=True)
class Generation:
    """What `generate` says about the call that runs now.

    Args:
        repeats: Consecutive rows of the batch that `generate` has made from one sample: its beams or return
            sequences.
        chunk: Text rows to which `generate` limits each call of the prefill; None for no limit.
        prompt: Text rows of the prompt.
    """

    repeats: int = 1
    chunk: int | None = None
    prompt: int = 0

    def require_whole_prompt(self, family: str, *, is_mask_cut: bool = False) -> None:
        """Raise if the prompt arrives in chunks: a policy would see the first one only.

        Args:
            family: Name of the family, for the message.
            is_mask_cut: Whether the encoder's attention mask is not as wide as its states. Transformers cuts
                it to the length of the first chunk, even if there is only one.

        Raises:
            UnsupportedModelError: Names the option.
        """
        if self.chunk is not None and (self.chunk < self.prompt or is_mask_cut):
            raise UnsupportedModelError(
                f"prefill_chunk_size={self.chunk} passes the prompt of {family} in chunks. Only the first "
                "one comes with encoder states, so a policy would decide without the rest of the prompt, and "
                "the encoder's attention mask is cut to its length; leave prefill_chunk_size out"
            )


def running_generation(model: nn.Module, *, is_traced: bool = False) -> Generation:
    """Return what the innermost `generate` of a model, or of a model that contains it, says.

    `Generation()` if the model was called by hand.

    Args:
        model: The model, or a part of it.
        is_traced: Whether torch.compile traces the caller, which begins a prefill.

    Raises:
        UnsupportedModelError: If the caller is traced.
    """
    if is_traced:
        raise UnsupportedModelError(
            f"torch.compile traces a call of {type(model).__name__} that brings encoder states. There a "
            "policy decides by what it measures, which cannot be compiled. Leave out torch.compile: "
            'generate(..., cache_implementation="static", compile_config=CompileConfig()) compiles decode '
            'steps alone; or wrap the call in torch.compiler.set_stance("force_eager")'
        )
    code = _code()
    for frame in callers():
        if frame.f_code is not code or not _contains(frame.f_locals.get("self"), model):
            continue
        options, prompt = frame.f_locals["generation_config"], frame.f_locals["input_ids"]
        return Generation(
            repeats=max(options.num_beams or 1, options.num_return_sequences or 1),
            chunk=getattr(options, "prefill_chunk_size", None),
            prompt=prompt.shape[1],
        )
    return Generation()


def prompt_first(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a generator of draft tokens whose first drafts are rejected unseen.

    Otherwise assisted decoding verifies them in the prefill, where they attend to tokens that are dropped
    right afterwards, and it would answer otherwise than greedy decoding.

    Args:
        make: ``_get_candidate_generator`` of a model.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    drafts = make(*args, **kwargs)
    draft, options = drafts.get_candidates, kwargs.get("generation_config")

    def reject(input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        _require_open_end(input_ids, options)
        draft(input_ids, *args, **kwargs)  # so that the assistant reads the prompt now, as it expects
        del drafts.get_candidates  # from now on, that of its class
        return input_ids, None

    drafts.get_candidates = reject
    return drafts


def _require_open_end(prompt: Tensor, options: Any) -> None:
    """Raise where transformers takes a prompt whose last token ends a sequence for a finished answer.

    Releases before 5.23 do, if there are no drafts, and real BART models begin with such a token.

    Raises:
        UnsupportedModelError: Says which release to install.
    """
    ends = getattr(options, "_eos_token_tensor", None)
    code = inspect.unwrap(getattr(_mixin(), "_assisted_decoding", None) or _mixin).__code__
    if ends is not None and "is_done_candidate" in code.co_varnames and bool((prompt[:, -1:] == ends).any()):
        raise UnsupportedModelError(
            "this release of transformers stops assisted decoding at once if the prompt ends with an "
            "end-of-sequence token, as that of BART does; install transformers 5.23.0 or newer, or decode "
            "without drafts"
        )


def probe_generation() -> Probe:
    """Check that transformers has the methods and local variables that are read."""
    from transformers import GenerationMixin  # slow to import

    code = _code()
    missing = [name for name in _READ if name not in code.co_varnames + code.co_cellvars]
    missing += [name for name in (CANDIDATES,) if not hasattr(GenerationMixin, name)]
    detail = f"lacks {', '.join(missing)}" if missing else f"has {', '.join((*_READ, CANDIDATES))}"
    return Probe("GenerationMixin", not missing, detail)


def callers() -> Iterator[FrameType]:
    """Yield the frames of this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _contains(outer: Any, model: nn.Module) -> bool:
    return outer is model or (
        isinstance(outer, nn.Module) and any(module is model for module in outer.modules())
    )


def _mixin() -> Any:
    from transformers import GenerationMixin  # slow to import

    return GenerationMixin


def _code() -> CodeType:
    """Return the code of `generate`, without its decorators."""
    code: CodeType = inspect.unwrap(_mixin().generate).__code__
    return code
