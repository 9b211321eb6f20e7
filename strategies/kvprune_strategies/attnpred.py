"""`attnpred`: in each decode step, read the blocks that are expected to receive most attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import Budget, DecodePolicy, HeldView, Selection, StepView, TrainedPolicy, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import BudgetPolicy, State
from kvprune_strategies import attention_blocks as blocks
from kvprune_strategies import attention_predictors as predictors

_HISTORY = "history"


@dataclass(frozen=True, kw_only=True)
class AttnPred(TrainedPolicy, BudgetPolicy, DecodePolicy):
    """Read in each decode step the blocks that are expected to receive most attention; keep everything.

    The history is the attention that blocks of entries received from the last rows, first those of the
    prompt. The largest attention to an entry of a block counts for the block. What the next row will be is
    expected from the history alone, before the step's queries exist, so that blocks can be fetched early.
    Blocks are read whole, in the order of what is expected, until the budget is spent; the last one may be
    read in part, from its beginning. Class tokens are read first.

    A row of a step enters the history as the step saw it: what was not read received nothing. So each
    ``interval``-th step reads everything, and corrects the history. Such steps count in what receipts say is
    read: with the defaults and keep_ratio=0.1, steps read 0.1, 0.1, 0.1, 0.1 and 1 of the cache, 0.28 in the
    mean.

    Args:
        keep_ratio: Fraction of visible tokens that a step reads, in (0, 1]; 0.5 if neither this nor
            keep_tokens is given. All tokens stay in the cache.
        keep_tokens: Number of visible tokens that a step reads, instead of a fraction.
        predictor: "cnn" asks a small convolutional network. "last" expects the last row again, "mean" the
            mean of the history, and "ema" a mean in which older rows count less; they need no weights.
        history: Rows of the history.
        interval: Every so many steps, one reads everything; 1 for all of them, 0 for none.
        first: Steps after the prompt that read everything, before any other. Rows of a prompt that ask for
            nothing, such as Whisper's four tokens, do not say what to expect.
        block: Entries of a block.
        decay: For "ema", how much a row counts relative to the next one, in (0, 1).
        offload: Whether the cache lies in host memory while the model decodes. After each step, the blocks of
            the next one are chosen, and copied to the device while it computes something else. What is read
            and generated stays the same (docs/decode-policies.md says what waits).
        weights: Of the network, for "cnn": "demo" or "whisper-base", for the embedded model and
            openai/whisper-base; or a file. They are made for one ``history`` and one ``block``, and work with
            any number of heads, layers and blocks. ``python tests/train_attnpred.py`` trains others.
    """

    predictor: Literal["cnn", "last", "mean", "ema"] = "cnn"
    history: int = 16
    interval: int = 5
    first: int = 0
    block: int = 8
    decay: float = 0.7
    offload: bool = False

    name = "attnpred"
    version = 1
    needs = frozenset({"queries"})
    foresees: ClassVar[bool] = True  # what a step reads follows from the history
    trained_options: ClassVar[tuple[str, ...]] = ("history", "block")
    on_any_model = MappingProxyType({})  # the weights that come with it fit any model

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (("history", 1), ("interval", 0), ("first", 0), ("block", 1)):
            if getattr(self, option) < least:
                raise PolicyOptionError(
                    f"{option} of policy 'attnpred' is at least {least}, got {getattr(self, option)}"
                )
        if not 0 < self.decay < 1:
            raise PolicyOptionError(f"decay of policy 'attnpred' lies in (0, 1), got {self.decay}")
        if self.predictor != "cnn" and self.weights != type(self).weights:
            raise PolicyOptionError(
                f"policy 'attnpred' reads weights with predictor=cnn alone, got predictor={self.predictor} "
                f"and weights={self.weights}; leave one of them out"
            )

    @property
    def exact_budget(self) -> Budget | None:
        """None: the budget says what a step reads, and the cache keeps everything."""
        return None

    @property
    def offloads(self) -> bool:
        """Whether the cache lies in host memory, and steps read copies that were made ahead."""
        return self.offload

    @property
    def weights_path(self) -> Path | None:
        """The file of the weights; None if the predictor has none."""
        return super().weights_path if self.predictor == "cnn" else None

    def initial(self, geometry: Mapping[str, int]) -> Mapping[str, Tensor]:
        """Return the weights that training starts from."""
        return predictors.initial_weights()

    def prepare(self, view: HeldView) -> State:
        """Return the history of the prompt, which entries form a block, and how much each sample reads.

        ``history`` is ``[R, Hq, M, P]`` for M rows and P blocks. Which entries form a block is left out where
        each is the next ``block`` entries, and ``limit [R]`` where all samples read equally many.
        """
        numbers = self._numbered(view)  # [R, columns]
        by_entry = numbers[:, None].expand(-1, view.slots.shape[1], -1).gather(-1, view.slots)
        members = blocks.entry_blocks(by_entry, view.valid, self.block)
        state = {blocks.COLUMNS: numbers.int(), **members}
        state[_HISTORY] = blocks.prompt_history(view, members, self.block, self.history)
        counts = view.valid[:, 0].sum(-1).tolist()  # heads hold equally many
        if min(counts) < view.entries:
            state["limit"] = torch.tensor(self.budget.resolve_all(counts), device=view.keys.device)
        return state

    def _numbered(self, view: HeldView) -> Tensor:
        """Return the number of the block of each column so far, int64 ``[R, columns]``."""
        rows = len(view.keys)
        new = blocks.column_blocks(view.layer, self.block).expand(rows, -1)
        new = blocks.of_all_columns(new, view.received)
        if view.earlier is None:
            return new
        before = view.earlier[blocks.COLUMNS]  # a row for each row of the batch; copies hold the same
        before = before[:: len(before) // rows].long()
        after = torch.where(before < 0, -before, before + 1).amax(-1, keepdim=True)  # [R, 1]
        return torch.cat([before, torch.where(new < 0, new - after, new + after)], dim=-1)

    def attend(self, step: StepView, state: State) -> Selection | None:
        """Read the blocks that are expected to receive most; everything in some steps."""
        count = self.budget.resolve(step.entries)
        if count == step.entries or self._reads_all(step.taken):
            return None
        expected = scoring.by_kv_head(self._expected(step, state), step.heads)  # [N, Hkv, P]
        scores = blocks.spread(expected, state, self.block, step.entries)  # [N, Hkv, K]
        return step.best(scores, count, state.get("limit"))

    def _reads_all(self, taken: int) -> bool:
        """Whether a step reads everything, after so many others."""
        return taken < self.first or (self.interval > 0 and (taken + 1) % self.interval == 0)

    def observe(self, step: StepView, attention: Tensor, state: State) -> tuple[State, Selection | None]:
        """Let the step's attention take the place of the oldest row of the history."""
        row = blocks.pooled(attention[:, :, None], state, self.block)  # [N, Hq, 1, P]
        return {**state, _HISTORY: torch.cat([state[_HISTORY][:, :, 1:], row], dim=2)}, None

    def _expected(self, step: StepView, state: State) -> Tensor:
        """Return the attention that each block is expected to receive, ``[N, Hq, P]``."""
        history = state[_HISTORY]
        if self.predictor == "last":
            return predictors.last(history)
        if self.predictor == "mean":
            return predictors.mean(history)
        if self.predictor == "ema":
            return predictors.ema(history, self.decay)
        return predictors.network(step.weights(self), history.float(), blocks.real_blocks(state))

    compiles: ClassVar[bool] = False  # which steps read everything, only the host can say

    fidelity = "adapted"
    paper = "arXiv 2502.04077 (AttentionPredictor)"
    deviations = """
    The original always reads the first and the last 64 tokens of a text. Encoder tokens are neither first nor
    recent, so class tokens take their place. Blocks stay within a row of a picture. The step that corrects
    the history reads everything and answers from it. The original computes full attention in each step, to
    simulate what it skips, and does not answer from it. What is expected is averaged over the query heads
    that share a KV head, because they read the same blocks. The last block may be read in part, so that the
    budget is exact. No layer is left whole; the original's scripts leave two. The history has 16 rows instead
    of 64, and a block 8 tokens instead of 16, because prompts and rows of pictures are short. The published
    weights were trained on self-attention of other models; these were trained here, on cross-attention, with
    the squared error of the next row. Some rows of their histories are made as sparse as a step leaves them.
    Off-load with prefetch is in the paper and not in the code. Here it is offload=true: no entry stays on the
    device, and steps that read everything copy one layer at a time, when it attends.
    """
    differs = (
        "class tokens are read always, instead of the first and last 64; a step that corrects the history "
        "also answers from the full cache; heads of a group read the same blocks; no layer is left whole"
    )
    checked_against = (
        "same blocks in each of six steps as MIRALab-USTC/LLM-AttentionPredictor@8196868, with the same "
        "weights, drawn at random"
    )
    cost = (
        "after the prompt, attention of its last rows; in each step, the predictor (cnn: 76 000 products for "
        "each block and query head), a sort of the entries, a copy of what is read, and a second product of "
        "queries and the keys that are read"
    )
    bibtex = """
@article{attnpred2025,
  title = {{AttentionPredictor}: Temporal Pattern Matters for Efficient {LLM} Inference},
  author = {Yang, Qingyue and Wang, Jie and Li, Xing and Wang, Zhihai and Chen, Chen and Chen, Lei and
            Yu, Xianzhi and Liu, Wulong and Hao, Jianye and Yuan, Mingxuan and others},
  year = {2025},
  eprint = {2502.04077},
  archivePrefix = {arXiv},
}
"""
