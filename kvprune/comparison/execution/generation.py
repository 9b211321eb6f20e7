"""A model with its processor: what pictures and speech have in common when a batch is answered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self, TypedDict

import torch

from kvprune.comparison.data.examples import Example, Kind
from kvprune.comparison.data.packages import require
from kvprune.comparison.execution.answer_guidance import AnswerGuidance
from kvprune.comparison.execution.contrasted import Contrasted
from kvprune.comparison.execution.encoder_reuse import EncoderReuse
from kvprune.comparison.execution.loading import load_model
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.storage.answers import Answer
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.nesting import parts
from kvprune.session.compression import Compression, compress
from kvprune.session.contrast import contrast
from kvprune.session.registry import find_adapter, get_policy

__all__ = ["Generator", "Measured"]


class Measured(TypedDict):
    """What an answer of any kind says; see `Answer`."""

    spec: str
    seed: int | None
    id: str
    task: str
    answer: str
    agrees_with_full: bool
    finished: bool
    kept_fraction: float
    bytes_held: int
    bytes_full: int
    receipt: str
    read_fraction: float | None


@dataclass(frozen=True, kw_only=True)
class Generator(ABC):
    """A model and its processor, ready to answer batches of one kind of example, greedily.

    Args:
        model: A model with `generate` that an adapter supports.
        processor: Its processor.
        max_new_tokens: Limit on the length of an answer, in tokens.
        reread: Read the last token of each prompt again from the pruned cache; see `kvprune.compress`.
        guide: A model that guides this one, or answers in its place, where a configuration says so.

    Class attributes:
        kind: The kind of examples.
        packages: Modules that it needs and that do not come with the plain install.
    """

    kind: ClassVar[Kind]
    packages: ClassVar[tuple[str, ...]] = ()

    model: Any
    processor: Any
    max_new_tokens: int
    reread: bool = False
    guide: Generator | None = None

    @cached_property
    def encoder(self) -> EncoderReuse:
        """Remembers the output of the model's encoder for the latest batch."""
        return EncoderReuse.of(find_adapter(self.model)(self.model))

    @cached_property
    def answers(self) -> AnswerGuidance:
        """Remembers what the full cache answered to the latest batch."""
        return AnswerGuidance(self.model)

    def answering(self, one: Configuration) -> Generator:
        """Return who answers under a configuration: this model, or the guide alone."""
        if one.guide != "answers":
            return self
        assert self.guide is not None
        return self.guide

    @contextmanager
    def encoding_once(self, one: Configuration) -> Iterator[None]:
        """Let all encoders that run under a configuration reuse their output for a batch."""
        with ExitStack() as stack:
            stack.enter_context(self.answering(one).encoder.during(one.policy))
            if one.guide == "guides" and self.guide is not None:
                stack.enter_context(self.guide.encoder.during(one.policy))
            yield

    def compress_for(
        self, one: Configuration, inputs: Mapping[str, Any], seed: int
    ) -> Compression | Contrasted:
        """Return the compression or contrast under which a configuration answers a batch; see `compress`.

        The second branch of a contrast reads the last prompt token again, unless its policy decides from
        features, whatever `reread` says.
        """
        if one.contrast is not None:
            return Contrasted(contrast(self.model, one.policy, one.contrast, seed=seed))
        if one.guide == "guides":
            assert self.guide is not None
            return compress(self.model, one.policy, seed=seed, guide=self.guide.model, reread=self.reread)
        return self.answering(one).compress(one.policy, inputs, seed)

    def compress(self, policy: CrossKVPolicy, inputs: Mapping[str, Any], seed: int) -> Compression:
        """Return the compression under which a policy answers a batch.

        A policy that may look at the answer is given what the full cache answers, which is generated first
        unless it is known.

        Args:
            policy: The policy.
            inputs: What `encode` returned.
            seed: Seed for policies that draw at random.

        Raises:
            KVPruneError: As `kvprune.compress` and `kvprune.answer_attention` say.
        """
        if not any(part.reads_answer for part in parts(policy)):
            return compress(self.model, policy, seed=seed, reread=self.reread)
        full = get_policy(REFERENCE)
        with self.encoder.during(full):
            if not self.answers.knows(inputs):
                with compress(self.model, full, reread=self.reread):
                    self.note_full(inputs, self.generate(inputs))
            guide = self.answers.of(inputs)
        return compress(self.model, policy, seed=seed, guide=guide, reread=self.reread)

    def note_full(self, inputs: Mapping[str, Any], new: torch.Tensor) -> None:
        """Note what the full cache answered to a batch, new tokens ``[B, new]``."""
        self.answers.note(inputs, new, self.lengths(new), self.max_new_tokens)

    @classmethod
    def load(
        cls,
        model: str | None,
        *,
        device: str,
        dtype: str,
        attn_implementation: str | None,
        max_new_tokens: int | None,
        reread: bool = False,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a model and its processor, and check that they can answer examples of this kind.

        Args:
            model: Hub id or local folder; None is that of the demo.
            device: A torch device such as ``cpu`` or ``cuda:0``.
            dtype: One of `DTYPES`.
            attn_implementation: Passed to transformers; None is its default.
            max_new_tokens: Limit on the length of an answer, in tokens; None is the default of the kind.
            reread: Read the last token of each prompt again from the pruned cache.
            trust_remote_code: Let transformers run Python files that come with the model.

        Raises:
            UnsupportedModelError: If the model cannot be loaded, needs code of its own, has no adapter, or
                cannot answer examples of this kind.
            ModuleNotFoundError: If a package is missing; says how to install it.
        """
        require(*cls.packages, extra=cls.kind, who=f"{cls.kind}: this")
        loaded, processor = load_model(
            model,
            cls.kind,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        find_adapter(loaded)
        limit = cls.check_model(str(model), loaded, processor, max_new_tokens)
        return cls(model=loaded.eval(), processor=processor, max_new_tokens=limit, reread=reread)

    @classmethod
    @abstractmethod
    def check_model(cls, name: str, model: Any, processor: Any, max_new_tokens: int | None) -> int:
        """Return the limit on new tokens of a model that can answer examples of this kind.

        Args:
            name: Name of the model, for messages.
            model: The model.
            processor: Its processor.
            max_new_tokens: The limit that was asked for; None is the default.

        Raises:
            UnsupportedModelError: If the model cannot.
        """

    @abstractmethod
    def check(self, examples: Sequence[Example]) -> None:
        """Raise, before anything is computed, unless this model can be asked all of these examples.

        Raises:
            DataError: Names the first example that it cannot be asked.
        """

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> Mapping[str, Any]:
        """Return what `generate` takes for a batch: tensors, and options of the model's ``generate``.

        Raises:
            DataError: If a file cannot be read, or the processor cannot encode it.
        """

    @abstractmethod
    def generate(
        self,
        inputs: Mapping[str, Any],
        tokens: int | None = None,
        *,
        limit: int | None = None,
        caps: Sequence[int] = (),
        on_first: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Return new tokens without the prompt, int64 ``[B, new]``, decoded greedily.

        Args:
            inputs: What `encode` returned.
            tokens: Exact number of new tokens to generate; None lets the model end its answers.
            limit: Most new tokens; None is `max_new_tokens`.
            caps: Where the caller will cut each answer, so that nobody writes far beyond it; only long
                recordings need it.
            on_first: Called once, when the first new token of the batch is there.
        """

    def most_tokens(self, example: Example) -> int:
        """Return the limit on an answer to an example, in tokens."""
        return self.max_new_tokens

    def lengths(self, new: torch.Tensor) -> list[int]:
        """Return the length of each answer in tokens, without the token that ends it.

        Args:
            new: New tokens, int64 ``[B, new]``.
        """
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or []), device=new.device)
        going = ~torch.isin(new, ends)  # [B, new]
        lengths: list[int] = going.cumprod(-1).sum(-1).tolist()
        return lengths

    def texts(self, new: torch.Tensor) -> list[str]:
        """Return answers as text, without special tokens.

        Args:
            new: New tokens, int64 ``[B, new]``.
        """
        decoded: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in decoded]

    @abstractmethod
    def judge(self, example: Example, measured: Measured, *, tokens: int, cap: int) -> Answer:
        """Return the answer, with what is right or wrong about it.

        Args:
            example: What was asked.
            measured: The answer and what was measured.
            tokens: Its length in tokens.
            cap: Limit on its length.
        """
