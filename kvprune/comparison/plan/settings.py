"""The settings of a comparison, and how it reports progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvprune.comparison.plan.devices import DTYPES
from kvprune.errors import KVPruneError

__all__ = [
    "DEFAULT_AGAINST",
    "DEFAULT_OUTPUT",
    "EMBEDDED_GUIDE",
    "NO_GUIDE",
    "PICTURE_TOKENS",
    "Progress",
    "Settings",
]

DEFAULT_OUTPUT = "kvprune-results"

DEFAULT_AGAINST = "trim"
"""The policy that others are compared with, unless another one is chosen."""

PICTURE_TOKENS = 16
"""Limit on new tokens of an answer to a question about a picture, unless another one is given."""

DEMOS = ("pictures", "speech")

EMBEDDED_GUIDE, NO_GUIDE = "embedded", "self"
"""Values of `Settings.guide` that are no models: the guide that comes with kvprune, and no guide at all."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a comparison is done.

    Attributes:
        phase: what is being done, in words.
        done: finished units of work, those of earlier runs included.
        total: number of all units of work; all take about equally long.
    """

    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a comparison: everything except its policies and budgets.

    Args:
        model: Hub id or local folder; None is the demo's.
        guide: Hub id or local folder of a model that guides policies which ask for guidance, such as
            ``guided``, in rows of their own; "embedded" is that of the embedded model. With "self", models
            only guide themselves. None is "embedded" for the embedded model and "self" for others.
        data: JSON-lines file of questions or utterances; None takes the demo's.
        demo: Which demo: questions about pictures to the embedded model, or recordings that come with kvprune
            for Whisper base.
        tasks: Tasks to ask; None asks all.
        limit: Examples per task; None asks all of `data`, and `sources.DEFAULT_LIMIT` of the demo.
        seed: Seed for policies that draw at random, and for the demo's questions.
        output: Results folder.
        batch_size: Examples per call of `generate`.
        max_new_tokens: Limit on the length of an answer, in tokens; None is 16 for questions about pictures,
            and for speech what the model permits.
        reread: Read the last token of each prompt again from the pruned cache; see `kvprune.compress`.
        draws: How many seeds a policy that draws at random runs with: `seed`, `seed` + 1, ...
        against: Name or label of the policy that others are compared with at the same budget.
        answer_attention: Add the reference row that may look at the answer, at each keep ratio.
        device: A torch device; None is the first CUDA device, or the CPU where there is none.
        dtype: One of `DTYPES`.
        attn_implementation: Passed to transformers; None is its default.
        repetitions: How often each configuration is timed; 0 times nothing.
        trust_remote_code: Let transformers run Python files that come with `model`.

    Raises:
        KVPruneError: If a value is out of range.
    """

    model: str | None = None
    guide: str | None = None
    data: Path | None = None
    demo: Literal["pictures", "speech"] = "pictures"
    tasks: Sequence[str] | None = None
    limit: int | None = None
    seed: int = 0
    output: Path = Path(DEFAULT_OUTPUT)
    batch_size: int = 16
    max_new_tokens: int | None = None
    reread: bool = True
    draws: int = 1
    against: str = DEFAULT_AGAINST
    answer_attention: bool = True
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    repetitions: int = 5
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("max_new_tokens", 1),
            ("draws", 1),
            ("repetitions", 0),
            ("limit", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise KVPruneError(f"{name} is {value}; it must be at least {least}")
        if self.demo not in DEMOS:
            raise KVPruneError(f"unknown demo {self.demo!r}; choose from {', '.join(DEMOS)}")
        if self.dtype not in DTYPES:
            raise KVPruneError(f"unknown dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")
