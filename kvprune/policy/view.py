"""Views, the inputs of a policy: encoder features before the first layer, or one cross-attention layer.

Views are read-only by contract: a policy neither writes to their tensors nor keeps references to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from kvprune import scoring
from kvprune.errors import PolicyOptionError, ScoreError, UnsupportedModelError
from kvprune.policy.captured import Captured
from kvprune.policy.geometry import Geometry
from kvprune.policy.held_weights import HeldWeights, Weighted
from kvprune.policy.text_view import TextView
from kvprune.tokens import randomness
from kvprune.tokens.layout import Layout
from kvprune.tokens.precision import accumulation_dtype
from kvprune.tokens.visibility import Visibility

__all__ = ["FeatureView", "LayerView", "View"]

_Captured = TypeVar("_Captured", bound="Tensor | TextView")


@dataclass(frozen=True, kw_only=True, eq=False)
class View(Geometry, Weighted):
    """Properties that all views of encoder tokens share.

    Axes: B batch as the model saw it, T text rows, S encoder tokens that reached this point, C width of
    encoder features. When a second image arrives, S counts its columns only.

    Args:
        visibility: Which text rows may attend which columns; the properties below answer the usual questions.
        num_layers: Number of cross-attention layers L.
        seed: The seed that was given to ``compress``.
        fingerprints: Returns int64 ``[B]``, a digest of the encoder's input for each sample.
        policy_name: For messages.
        layout_of: Returns the positions of the columns in their images; None if unknown.
        captured: Tensors that the policy declared in ``needs``; a `FeatureView` always has the features.
        on_draw: Called when the policy takes the generator; the report says that the policy drew.
        held: The weights that the run holds.
    """

    visibility: Visibility
    num_layers: int
    seed: int = 0
    fingerprints: Callable[[], Tensor] = lambda: torch.zeros(1, dtype=torch.int64)
    policy_name: str = "?"
    layout_of: Callable[[], Layout] | None = None
    captured: Captured = Captured()
    on_draw: Callable[[], None] = lambda: None
    held: HeldWeights = field(default_factory=HeldWeights, repr=False)

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return self.visibility.batch

    @property
    def columns(self) -> int:
        """Number of columns S."""
        return self.visibility.columns

    @property
    def heads(self) -> int:
        """Number of heads that may keep different columns: 1, all heads share them."""
        return 1

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.visibility.rows.device

    @property
    def where(self) -> str:
        """The moment and layer of the view, for messages."""
        return "before the first cross-attention layer"

    @property
    def visible(self) -> Tensor:
        """Columns that decoding can see, bool ``[B, S]``; budgets count these."""
        return self.visibility.decode

    @property
    def visible_in_prefill(self) -> Tensor:
        """Columns that some live text row can see, bool ``[B, S]``."""
        return self.visibility.prefill

    @property
    def live(self) -> Tensor:
        """Text rows that are no padding and see an image, bool ``[B, T]``."""
        return self.visibility.live

    @property
    def groups(self) -> Tensor:
        """Visibility group of each column, int64 ``[B, S]``, -1 if unseen; each group keeps one column."""
        return self.visibility.groups

    @property
    def strata(self) -> Tensor:
        """Stratum of each column, int64 ``[B, S]``, for budgets: 0 if decoding sees it, -1 if unseen."""
        return self.visibility.strata

    @property
    def decode_strata(self) -> Tensor:
        """Stratum of each column for cache budgets, int64 ``[B, S]``: 0 if decoding sees it, else -1."""
        return self.visibility.decode_strata

    @property
    def features(self) -> Tensor:
        """Encoder features as they enter the projections to keys and values, ``[B, S, C]``."""
        return self._needed(self.captured.features, "features")

    @property
    def guidance(self) -> Tensor:
        """Importance of each encoder token according to the guide, ``[B, S]`` in float32 (or float64).

        The attention that a token receives, summed over the guide's cross-attention layers, heads and live
        text rows (see `kvprune.Guide`); 0 for tokens that no row sees.
        """
        return self._needed(self.captured.guidance, "guidance")

    @property
    def class_attention(self) -> Tensor:
        """Attention from each tile's class token to its patches in the vision encoder, ``[B, S]``.

        Summed over the heads of one layer and normalized to sum to 1 in each tile, in float32 (float64 in a
        float64 model); 0 for class tokens and padding tiles. A merged column has the value of the column
        that took the others.
        """
        return self._needed(self.captured.class_attention, "class_attention")

    @property
    def question(self) -> Tensor:
        """What the model makes of the prompt's text without the picture, ``[B, W]``.

        The hidden state of the last token of the prompt after the last layer and its norm, in a pass over the
        text that skips cross-attention. W is the width of the text layers.
        """
        return self._needed(self.captured.question, "question")

    @property
    def _place(self) -> int:
        """Number that gives each layer its own random numbers; -1 before the first layer."""
        return -1

    def random(self, heads: int = 1) -> Tensor:
        """Return uniform random numbers in [0, 1), float32 ``[B, heads, S]``.

        They differ by seed, layer and sample, and are the same on any device and in any batch (KV10).
        """
        fingerprints = self.fingerprints().expand(self.batch)
        return randomness.uniform(self.seed, self._place, fingerprints, heads, self.columns).to(self.device)

    @cached_property
    def generator(self) -> torch.Generator:
        """CPU generator for this seed and layer.

        Do not draw tensors with a batch axis from it, or the numbers of a sample depend on its place in the
        batch; use `random` for these.
        """
        self.on_draw()
        return randomness.generator(self.seed, self._place)

    def capturing(self, **captured: Any) -> Self:
        """Return the view with some captured tensors replaced, by name; None removes one."""
        return replace(self, captured=replace(self.captured, **captured))

    def without_captured(self) -> Self:
        """Return the view without its captured tensors, which may be large."""
        return replace(self, captured=Captured())

    def _needed(self, tensor: _Captured | None, what: str) -> _Captured:
        if tensor is None:
            raise PolicyOptionError(
                f"policy {self.policy_name!r} reads view.{what} {self.where} without declaring "
                f'it; write needs = frozenset({{"{what}"}}) in the class'
            )
        return tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureView(View):
    """Encoder features before the first cross-attention layer: no queries, keys or values exist yet."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerView(View):
    """One cross-attention layer after its attention in prefill.

    Axes in addition to those of `View`: Hq and Hkv query and KV heads, D head width.

    Args:
        keys: ``[B, Hkv, S, D]`` as they are cached (in Mllama: after ``k_norm``).
        values: ``[B, Hkv, S, D]``.
        layer_idx: Index of the decoder layer in the model (3, 8, 13, ... in Llama-3.2-11B-Vision).
        rank: Index among the cross-attention layers, 0 to L - 1.
        scaling: Factor on attention logits.
        follows_text: Whether a self-attention layer comes before this layer; false if it is the decoder's
            first layer.
    """

    keys: Tensor
    values: Tensor
    layer_idx: int
    rank: int
    scaling: float
    follows_text: bool = True

    @property
    def heads(self) -> int:
        """Number of KV heads Hkv, which may keep different columns."""
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.keys.device

    @property
    def where(self) -> str:
        """The moment and layer of the view, for messages."""
        return f"at layer {self.layer_idx}"

    @property
    def _place(self) -> int:
        return self.rank

    @property
    def queries(self) -> Tensor:
        """Queries of this layer as they entered attention, ``[B, Hq, T, D]``."""
        return self._needed(self.captured.queries, "queries")

    @property
    def raw_keys(self) -> Tensor:
        """Keys before the key norm, ``[B, Hkv, S, D]``; the cached keys in models without one."""
        return self._needed(self.captured.raw_keys, "raw_keys")

    @property
    def reconstruction(self) -> Tensor:
        """How much the model needs each token to write what the encoder has read, ``[B, Hkv, S]``.

        The largest attention weight that the token receives in this layer, over all rows and the query heads
        of each KV head, while the decoder reads a text of what the encoder has read
        (`kvprune.policy.Reconstruction`).
        """
        return self._needed(self.captured.reconstruction, "reconstruction")

    @property
    def text(self) -> TextView:
        """The self-attention layer just before this layer.

        Raises:
            UnsupportedModelError: If there is none, because this layer is the decoder's first.
        """
        if not self.follows_text:
            raise UnsupportedModelError(
                f"policy {self.policy_name!r} reads view.text {self.where}, but this cross-attention layer "
                "is the first of the decoder: no self-attention comes before it (check view.follows_text)"
            )
        return self._needed(self.captured.text, "text")

    def attention_mass(self, rows: Tensor | None = None, *, null_keys: float = 0.0) -> Tensor:
        """Return the attention that each column receives, summed over live rows, ``[B, Hq, S]``.

        In float32 (float64 for float64 inputs).

        Args:
            rows: bool ``[B, T]``, live rows to sum over; all by default.
            null_keys: Number of additional keys with logit zero in each row's softmax ("n-softmax").

        Raises:
            ScoreError: If attention is not finite: the model's activations are NaN or overflow.
        """
        mass = scoring.attention_mass(
            self.queries, self.keys, self.visibility, self.scaling, rows, null_keys=null_keys
        )
        return self._finite(mass, "pairs of head and token, so nothing can be ranked")

    def attention_peak(self, rows: Tensor | None = None) -> Tensor:
        """Return the largest attention weight that each column receives from any live row, ``[B, Hq, S]``.

        Args:
            rows: bool ``[B, T]``, live rows that count; all by default.

        Raises:
            ScoreError: If attention is not finite: the model's activations are NaN or overflow.
        """
        peak = scoring.attention_peak(self.queries, self.keys, self.visibility, self.scaling, rows)
        return self._finite(peak, "pairs of head and token, so nothing can be ranked")

    def attention_density(self, threshold: float, columns: Tensor | None = None) -> Tensor:
        """Return the fraction of attention weights that are not small, float64 ``[B, Hq]``: 1 - sparsity.

        Args:
            threshold: A weight counts if it is at least this times the largest one of its row, in (0, 1].
            columns: bool ``[B, S]``, columns to count; all by default.

        Raises:
            ScoreError: If attention is not finite: the model's activations are NaN or overflow.
        """
        density = scoring.attention_density(
            self.queries, self.keys, self.visibility, self.scaling, threshold, columns
        )
        return self._finite(density, "heads, so their sparsity is unknown")

    def window_mass(self, rows: int) -> Tensor:
        """Return the attention that each column receives, summed over the last text rows, ``[B, Hq, S]``.

        Each stratum has its own window: the last live rows that see it. So an earlier image of an interleaved
        chat is ranked by the last rows of its own turn, not by rows that cannot see it.

        Args:
            rows: Length of the window; all rows if there are fewer.

        Returns:
            float32 (float64 for float64 inputs); 0 for unseen columns. If the rows of a window see only one
            stratum, each head sums to the number of these rows.

        Raises:
            ScoreError: If attention is not finite: the model's activations are NaN or overflow.
        """
        mass = self.queries.new_zeros(
            *self.queries.shape[:2], self.columns, dtype=accumulation_dtype(self.keys)
        )
        for members in scoring.each_stratum(self.strata):
            window = scoring.last_rows(self.visibility, rows, members)
            mass = torch.where(members[:, None], self.attention_mass(window), mass)
        return mass

    def _finite(self, tensor: Tensor, what: str) -> Tensor:
        if not bool(tensor.isfinite().all()):
            raise ScoreError(
                f"policy {self.policy_name!r} {self.where}: attention is NaN or infinite for "
                f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} {what}; "
                f"the model's queries or keys ({self.keys.dtype}) are not finite, or overflow"
            )
        return tensor
