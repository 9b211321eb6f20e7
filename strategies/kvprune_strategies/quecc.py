"""`quecc`: a trained compressor that makes one token of each cell of patches, knowing the question."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvprune import Decision, FeaturePolicy, FeatureView, Replacement, TrainedPolicy, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need
from kvprune_strategies.cells import Cells, cells_of

_WIDEST = 1024
"""Largest width inside the compressor; the width of the published one."""

_ELEMENTS = 2**22
"""Numbers of each tensor at once: 16 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class QueCC(TrainedPolicy, FeaturePolicy):
    """Make one new token of each cell of k x k patches, with the question in mind, by trained weights.

    A new token is the mean of the features of its cell, plus gamma times what a small attention layer reads
    from the same patches: ``out = mean_k(features) + gamma * W_o(attention)``. Its query is a depth-wise
    convolution over the cell's patches, to each of which the question has been added; its keys and values are
    the patches of the cell alone. gamma is 0 before training, so ``weights=fresh`` is mean pooling. Class
    tokens stay as they are.

    The question is what the model itself makes of the prompt without the picture, which takes a second pass
    of its text layers over the prompt. Families without such a pass (encoder-decoder models, such as Whisper)
    can use ``query=none``, with weights of their own. Whisper's prompt asks nothing: it names language and
    task. So what is left of the method there is a trained compressor of k frames to one token.

    Weights that come with kvprune: "demo", for the embedded model, with k of 2, 4 and 8, and with k=4 for
    ``query=none``; "whisper-base", for Whisper base, with k=10 for ``query=none``. ``kvprune train`` makes
    others.

    Args:
        k: Patches along the side of a cell, or frames in a cell where tokens lie on a line. It is the budget:
            about one token in k * k is left, or in k.
        query: "prompt": the question is added to the patches. "none": it is not, and one compression of a
            picture serves all questions.
        width: Channels inside the compressor: a small number makes small files of weights, and adds less to
            the mean. None is that of the weights; fresh ones are as wide as the features, at most 1024.
    """

    k: int = 2
    query: Literal["prompt", "none"] = "prompt"
    width: int | None = None

    name = "quecc"
    version = 1

    @property
    def trained_options(self) -> tuple[str, ...]:  # type: ignore[override]
        """Cell size and query; the width, too, unless it is that of the weights."""
        return ("k", "query") if self.width is None else ("k", "query", "width")

    @property
    def needs(self) -> frozenset[Need]:
        """The question, if it is used."""
        return frozenset({"question"}) if self.query == "prompt" else frozenset()

    @property
    def trained_for(self) -> tuple[str, ...]:
        """The width of the features, and that of the question if it is used."""
        return ("feature_width", "question_width") if self.query == "prompt" else ("feature_width",)

    @property
    def weights_name(self) -> str:
        """Each cell size has a file of its own."""
        query = "" if self.query == "prompt" else f"-{self.query}"
        return f"{super().weights_name}-k{self.k}{query}"

    def __post_init__(self) -> None:
        if isinstance(self.k, int) and self.k < 1:
            raise PolicyOptionError(f"k of policy {self.name!r} counts patches, at least 1, got {self.k!r}")
        if isinstance(self.width, int) and self.width < 1:
            raise PolicyOptionError(
                f"width of policy {self.name!r} counts channels, at least 1, got {self.width!r}"
            )
        super().__post_init__()
        file = self.weights_file
        if self.width is None and file is not None:
            object.__setattr__(self, "width", file.options.get("width"))

    def initial(self, geometry: Mapping[str, int]) -> Mapping[str, Tensor]:
        """Return the untrained compressor; its gamma is 0."""
        features = geometry["feature_width"]
        inside = min(features, _WIDEST) if self.width is None else self.width
        random = torch.Generator().manual_seed(0)
        made: dict[str, Tensor] = {"gamma": torch.zeros(1), "input.weight": torch.ones(features)}
        made["input.bias"] = torch.zeros(features)

        def linear(name: str, into: int, out: int) -> None:
            bound = 1 / math.sqrt(into)
            drawn = torch.rand(out, into + 1, generator=random)
            made[f"{name}.weight"] = (drawn[:, :-1] * 2 - 1) * bound
            made[f"{name}.bias"] = (drawn[:, -1] * 2 - 1) * bound

        def norm(name: str, width: int) -> None:
            made[f"{name}.norm.weight"], made[f"{name}.norm.bias"] = torch.ones(width), torch.zeros(width)

        if self.query == "prompt":
            linear("question", geometry["question_width"], features)
            norm("question", features)
        for name in ("query", "key", "value"):
            linear(f"{name}.1", features, inside)
            linear(f"{name}.2", inside, inside)
            norm(name, inside)
            linear(f"{name}.in", inside, inside)
        made["conv.weight"] = torch.full((inside, self.k * self.k), 1 / self.k**2)
        made["conv.bias"] = torch.zeros(inside)
        linear("out", inside, features)
        return made

    def choose(self, view: FeatureView) -> Decision:
        """Replace the columns of each cell by one new token, in the place of the first of them."""
        question = view.question if self.query == "prompt" else None
        cells = cells_of(view, self.k)
        features = compress(view.weights(self), view.features, cells, question)  # [B, N, C]
        return Decision(onward=Replacement(features, cells.places))

    fidelity = "adapted"
    paper = "arXiv 2411.03312 (QueCC)"
    deviations = """
    The paper trains the compressor in front of LLaVA's projector together with the language model, on 1.2
    million examples. Here the model is frozen: the compressor stands behind the projector, and learns by
    distillation to keep the answers of the model with all tokens. So the published accuracies say nothing
    about it. It adds to a mean over the cell, which is the untrained state, and normalises the features
    first, because each projector has a scale of its own. Keys and values are made of the features after the
    projector; the paper takes four layers of the vision tower, which Llama-3.2-Vision's projector has joined
    already. Class tokens, which LLaVA drops, stay. Cells at the edge of a tile that k does not divide are
    smaller. In a later turn of a chat, the question is that of the turn that brings the picture.
    """
    differs = "the model is frozen (distillation); behind the projector, as a residual of mean pooling"
    checked_against = "unverified: the authors' weights fit none of these models"
    cost = (
        "an extra pass of the text layers over the prompt; 8 S C d products, d = min(C, 1024); 82 MiB beside "
        "the weights, which take 152 MiB"
    )
    bibtex = """@article{quecc2025,
  title = {Inference Optimal {VLMs} Need Fewer Visual Tokens and More Parameters},
  author = {Li, Kevin Y. and Goyal, Sachin and Semedo, Jo{\\~a}o D. and Kolter, J. Zico},
  year = {2025},
  eprint = {2411.03312},
  archivePrefix = {arXiv},
}"""


def compress(
    weights: Mapping[str, Tensor], features: Tensor, cells: Cells, question: Tensor | None
) -> Tensor:
    """Return the features of the new tokens, ``[B, N, C]``, in the dtype of the features.

    Args:
        weights: Those of `QueCC.initial`, by name; with a gradient, if they are being trained.
        features: ``[B, S, C]``.
        cells: What each new token stands for.
        question: ``[B, W]``; None adds none.
    """
    dtype = scoring.accumulation_dtype(features)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    asked = None
    if question is not None:
        asked = _norm(_linear(question.to(dtype), weights, "question"), weights, "question.norm")  # [B, C]
    batch, tokens, size = cells.members.shape
    some = max(1, _ELEMENTS // (batch * size * features.shape[-1]))
    found = [
        _compressed(weights, features, cells, slice(start, start + some), asked)
        for start in range(0, tokens, some)
    ]
    return torch.cat(found, dim=1)


def _compressed(
    weights: Mapping[str, Tensor], features: Tensor, cells: Cells, part: slice, asked: Tensor | None
) -> Tensor:
    """Return the features of some of the new tokens, ``[B, n, C]``.

    Args:
        weights: As in `compress`, in float32 or float64.
        features: ``[B, S, C]``.
        cells: All cells.
        part: Which of them.
        asked: ``[B, C]``, what the question adds to each patch.
    """
    members, present = cells.members[:, part], cells.there[:, part]  # [B, n, P]
    index = members.flatten(1)[..., None].expand(-1, -1, features.shape[-1])
    own = features.gather(1, index).unflatten(1, members.shape[1:]).to(weights["gamma"].dtype)  # [B, n, P, C]
    there = present[..., None].to(own.dtype)  # [B, n, P, 1]
    mean = (own * there).sum(2) / there.sum(2)  # [B, n, C]
    patches = _norm(own, weights, "input")
    asking = patches if asked is None else patches + asked[:, None, None]
    queries = _norm(_mlp(asking, weights, "query"), weights, "query.norm")  # [B, n, P, d]
    kernel = weights["conv.weight"][:, cells.where].mT  # [P, d]
    query = (queries * there * kernel).sum(2) + weights["conv.bias"]  # [B, n, d]
    attention = _attention(
        _linear(query, weights, "query.in"),
        _linear(_norm(_mlp(patches, weights, "key"), weights, "key.norm"), weights, "key.in"),
        _linear(_norm(_mlp(patches, weights, "value"), weights, "value.norm"), weights, "value.in"),
        present,
    )  # [B, n, d]
    learned = weights["gamma"] * _linear(attention, weights, "out")  # [B, n, C]
    # Class tokens get nothing, so that they stay exactly as they are.
    return torch.where(cells.pooled[:, part, None], mean + learned, mean).to(features.dtype)


def _attention(query: Tensor, keys: Tensor, values: Tensor, there: Tensor) -> Tensor:
    """Return what each cell's query ``[B, N, d]`` reads from the cell's own P patches, ``[B, N, d]``."""
    width = query.shape[-1]
    heads = next(count for count in (8, 4, 2, 1) if width % count == 0)
    query, keys, values = (x.unflatten(-1, (heads, -1)) for x in (query, keys, values))
    logits = torch.einsum("bnhd,bnphd->bnhp", query, keys) / math.sqrt(width // heads)
    shares = logits.masked_fill(~there[:, :, None], -math.inf).softmax(-1)  # [B, N, heads, P]
    return torch.einsum("bnhp,bnphd->bnhd", shares, values).flatten(-2)


def _linear(tensor: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(tensor, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _mlp(tensor: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return _linear(F.gelu(_linear(tensor, weights, f"{name}.1")), weights, f"{name}.2")


def _norm(tensor: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(tensor, tensor.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])
