"""Small problems, described by letters and numbers, from which the same tensors are drawn again anywhere.

A `LayerProblem` becomes a `LayerView`, a `ModelProblem` a tiny model with inputs. Their descriptions are what
reproducers consist of.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from kvprune.adapters.tiny.models import mllama_inputs, tiny_bart, tiny_mllama
from kvprune.policy.captured import Captured
from kvprune.policy.text_view import TextView
from kvprune.policy.view import FeatureView, LayerView, View
from kvprune.testing.reference import existing, slow_groups
from kvprune.tokens.layout import Layout
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = ["DTYPES", "LayerProblem", "ModelProblem"]

DTYPES = ("float32", "float64", "bfloat16", "float16")

Content = Literal["random", "ties", "equal", "zero", "huge"]
Family = Literal["mllama", "encoder-decoder"]
Model = Literal["mllama", "bart"]
Precision = Literal["float64", "float32"]
_View = TypeVar("_View", bound=View)


class _ShortRepr:
    """Shows only what differs from the defaults, so that a reproducer is one line."""

    def __repr__(self) -> str:
        assert dataclasses.is_dataclass(self)
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerProblem(_ShortRepr):
    """One cross-attention layer after its attention, described so briefly that it can be pasted.

    Args:
        layouts: One string a sample: ``t`` is a text token, a digit an image of that many tiles. Text sees
            the latest run of images before it; shorter samples are padded on the left. In an
            encoder-decoder model the digits' sum is the length of what the encoder read.
        seed: For keys, values and queries, and of the view.
        family: "mllama" (tiles, one row of a mask for each text token) or "encoder-decoder" (all rows alike).
        patches: Columns a tile, at least 1.
        tiles: Tiles that are stored for each image, at least the highest digit.
        query_heads: Number of query heads Hq, a multiple of ``kv_heads``.
        kv_heads: Number of KV heads Hkv.
        width: Head width D.
        dtype: One of `DTYPES`.
        content: "random" numbers; "ties" (zeros and ones, most tokens have a twin); "equal" or "zero"
            everywhere; "huge" (about 1e4, so that softmax saturates).
        contiguous: Whether keys, values and queries lie in memory in the order of their axes.
        rank: Index of the layer among the cross-attention layers.
        num_layers: Number of cross-attention layers.
        received: Fraction of columns that an earlier layer passed on. Below 1, some columns only pad the
            ragged batch and do not exist.
        arrived: Images of earlier turns, whose columns are cached already and no part of the view.
    """

    layouts: tuple[str, ...] = ("1t",)
    seed: int = 0
    family: Family = "mllama"
    patches: int = 2
    tiles: int = 4
    query_heads: int = 2
    kv_heads: int = 2
    width: int = 4
    dtype: str = "float32"
    content: Content = "random"
    contiguous: bool = True
    rank: int = 0
    num_layers: int = 3
    received: float = 1.0
    arrived: int = 0

    def visibility(self) -> Visibility:
        """What the text rows may attend."""
        whole = self._mllama() if self.family == "mllama" else self._encoder_decoder()
        whole = whole.from_column(self.arrived * self.tiles * self.patches)
        if self.received == 1.0:
            return whole
        survivors = self._survivors(whole)
        return whole.at(survivors.indices[:, 0], survivors.valid[:, 0])

    def view(self, policy_name: str = "?") -> LayerView:
        """Draw the view; each call draws the same one anew."""
        see = self.visibility()
        text_rows = see.live.shape[1]
        return LayerView(
            layout_of=self.layout,
            captured=Captured(
                queries=self._draw("queries", self.query_heads, text_rows),
                raw_keys=self._draw("raw keys", self.kv_heads, see.columns),
                features=self._draw("features", 1, see.columns)[:, 0],
                guidance=self._draw("guidance", 1, see.columns)[:, 0, :, 0].abs().float(),
                reconstruction=self._draw("reconstruction", self.kv_heads, see.columns)[..., 0].abs().float(),
                class_attention=self._class_attention(see),
                question=self._draw("question", 1, 1)[:, 0, 0],
                text=self._text(see, policy_name),
            ),
            keys=self._draw("keys", self.kv_heads, see.columns),
            values=self._draw("values", self.kv_heads, see.columns),
            visibility=see,
            layer_idx=3 + 5 * self.rank,
            rank=self.rank,
            num_layers=self.num_layers,
            scaling=self.width**-0.5,
            seed=self.seed,
            fingerprints=self.fingerprints,
            policy_name=policy_name,
        )

    def _class_attention(self, see: Visibility) -> Tensor:
        """Draw what class tokens pay to patches; it adds up to 1 in each unit that is seen."""
        paid = self._draw("class attention", 1, see.columns)[:, 0, :, 0].double().abs()
        units = see.units.expand(see.batch, -1)
        paid = paid.masked_fill(~see.prefill, 0)
        total = torch.zeros(see.batch, see.rows.shape[-1], dtype=paid.dtype).scatter_add_(-1, units, paid)
        shares = paid / total.gather(-1, units).clamp(min=1e-30)
        return shares if self.dtype == "float64" else shares.float()

    def text(self, policy_name: str = "?") -> TextView:
        """Draw the self-attention before the layer; each call draws the same one anew."""
        return self._text(self.visibility(), policy_name)

    def _text(self, see: Visibility, policy_name: str) -> TextView:
        text_rows = see.live.shape[1]
        real = torch.ones(len(self.layouts), text_rows, dtype=torch.bool)
        if self.family == "mllama":
            for sample, text in enumerate(self.layouts):
                real[sample, : text_rows - len(text)] = False
        return TextView(
            queries=self._draw("text queries", self.query_heads, text_rows),
            keys=self._draw("text keys", self.kv_heads, text_rows),
            values=self._draw("text values", self.kv_heads, text_rows),
            real=real,
            scaling=self.width**-0.5,
            layer_idx=2 + 5 * self.rank,
            rank=2 + 4 * self.rank,
            num_layers=4 * self.num_layers,
            policy_name=policy_name,
            image_tokens=see.decode.sum(-1),
            cross_layers=self.num_layers,
        )

    def features(self, policy_name: str = "?") -> FeatureView:
        """Draw the view before the first layer; its features have the width of a head."""
        view = self.view(policy_name)
        fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(FeatureView)}
        return FeatureView(**fields)

    def layout(self) -> Layout:
        """Where the columns lie: tiles are two patches wide or one, and stand side by side; else a line."""
        whole = self._mllama() if self.family == "mllama" else self._encoder_decoder()
        arrived = self.arrived * self.tiles * self.patches
        if self.family == "mllama":
            column = torch.arange(whole.columns - arrived)
            tile, patch = column // self.patches % self.tiles, column % self.patches
            across = 2 if self.patches % 2 == 0 else 1
            row, place = patch // across, patch % across + tile * across
            layout = Layout(torch.stack([row, place], dim=-1)[None])
        else:
            layout = Layout.line(whole.columns - arrived)
        if self.received == 1.0:
            return layout
        survivors = self._survivors(whole.from_column(arrived))
        return layout.at(survivors.indices[:, 0], survivors.valid[:, 0])

    def fingerprints(self) -> Tensor:
        """Digest of each sample, int64 ``[B]``: the same alone as in the batch."""
        return torch.tensor([_digest(self.seed, sample, *text) for sample, text in enumerate(self.layouts)])

    def _draw(self, what: str, heads: int, length: int) -> Tensor:
        shape = (len(self.layouts), length, heads, self.width)
        random = torch.Generator().manual_seed(_digest(self.seed, self.rank, what))
        drawn = torch.randn(shape, generator=random, dtype=torch.float64)
        if self.content == "ties":
            drawn = (drawn > 0).double()
        elif self.content in ("equal", "zero"):
            drawn = torch.full_like(drawn, float(self.content == "equal"))
        elif self.content == "huge":
            drawn = drawn.clamp(-4, 4) * 1e4
        # Real models transpose after projecting: heads come before tokens, but not in memory.
        heads_first = drawn.to(getattr(torch, self.dtype)).transpose(1, 2)
        return heads_first.contiguous() if self.contiguous else heads_first

    def _mllama(self) -> Visibility:
        images = max(self.arrived + 1, *(sum(map(str.isdigit, text)) for text in self.layouts))
        length = max(map(len, self.layouts))
        rows = [[[False] * (images * self.tiles) for _ in range(length)] for _ in self.layouts]
        for sample, text in enumerate(self.layouts):
            run: list[int] = []  # units of the images that are seen now: the latest ones without text between
            image, last = 0, ""
            for row, letter in enumerate(text, start=length - len(text)):
                if letter.isdigit():
                    first = image * self.tiles
                    run = (run if last.isdigit() else []) + list(range(first, first + int(letter)))
                    image += 1
                for unit in run:
                    rows[sample][row][unit] = True
                last = letter
        units = torch.arange(images * self.tiles)
        seen = torch.tensor(rows, dtype=torch.bool)
        return Visibility(
            rows=seen,
            units=units.repeat_interleave(self.patches)[None],
            images=units // self.tiles,
            live=seen.any(-1),
        )

    def _encoder_decoder(self) -> Visibility:
        lengths = [max(1, sum(int(letter) for letter in text if letter.isdigit())) for text in self.layouts]
        columns = torch.arange(max(lengths) * self.patches)
        text_rows = max(1, *(text.count("t") for text in self.layouts))
        return Visibility(
            rows=torch.tensor([[[True, False]]]).expand(len(lengths), 1, 2),
            units=(columns >= torch.tensor(lengths)[:, None] * self.patches).long(),
            images=torch.zeros(2, dtype=torch.int64),
            live=torch.ones(len(lengths), text_rows, dtype=torch.bool),
        )

    def _survivors(self, whole: Visibility) -> Selection:
        """What an earlier layer passed on: a random part, and one column of each visibility group."""
        random = torch.Generator().manual_seed(_digest(self.seed, "survivors"))
        kept = (torch.rand(whole.batch, whole.columns, generator=random) < self.received).tolist()
        for sample in range(whole.batch):
            groups = slow_groups(whole, sample) or [existing(whole, sample)]
            seen = set().union(*groups)
            for column in range(whole.columns):
                kept[sample][column] = kept[sample][column] and column in seen
            for group in groups:
                kept[sample][min(group)] |= not any(kept[sample][column] for column in group)
        return Selection.from_mask(torch.tensor(kept)[:, None])


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelProblem(_ShortRepr):
    """A tiny random model and a batch for it, described so briefly that it can be pasted.

    Args:
        layouts: Sketches as in `LayerProblem` and `mllama_inputs`; for "bart", one token a letter.
        model: "mllama" or "bart".
        seed: For weights, token ids and pixels, and the seed of the compression.
        dtype: "float64" or "float32".
        beams: Beams of the search; 1 is greedy.
        steps: New tokens.
        kv_heads: KV heads of the Mllama, which has four query heads.
    """

    layouts: tuple[str, ...] = ("1t",)
    model: Model = "mllama"
    seed: int = 0
    dtype: Precision = "float64"
    beams: int = 1
    steps: int = 3
    kv_heads: int = 2

    def make_model(self) -> Any:
        """Build the model in eval mode."""
        dtype = getattr(torch, self.dtype)
        if self.model == "bart":
            return tiny_bart(self.seed, dtype=dtype)
        return tiny_mllama(self.seed, dtype=dtype, num_kv_heads=self.kv_heads)

    def make_inputs(self) -> dict[str, Tensor]:
        """Draw the batch."""
        if self.model == "mllama":
            return mllama_inputs(self.layouts, self.seed, getattr(torch, self.dtype))
        length = max(map(len, self.layouts))
        random = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(4, 60, (len(self.layouts), length), generator=random)
        mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in self.layouts])
        return {"input_ids": ids * mask, "attention_mask": mask}


def _digest(*parts: object) -> int:
    """A positive number that depends on the parts and not on the process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())
