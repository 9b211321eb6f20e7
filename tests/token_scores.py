"""What scores rank high and low in the demo's pictures: what glyphs show, or bare ground."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from question_needs import Question, Row, means
from torch import Tensor

import kvprune
from kvprune import CrossKVPolicy, Decision, LayerView, get_policy
from kvprune.demo.evaluate import encode


@dataclass(frozen=True, kw_only=True)
class Probe(CrossKVPolicy):
    """Keeps everything, and notes the scores of each layer in `_SEEN`."""

    name = "probe"
    needs = frozenset({"queries", "features", "class_attention"})

    def select(self, view: LayerView) -> Decision:
        _SEEN.extend((f"{name}, layer {view.layer_idx}", score) for name, score in scores(view).items())
        return Decision()


_SEEN: list[tuple[str, Tensor]] = []


@torch.no_grad()
def score_rows(model: Any, processor: Any, asked: Sequence[Question], size: int = 16) -> dict[str, Row]:
    """Return where each score of each layer is high, under the full cache; `size` questions at a time."""
    found: dict[str, list[Row]] = defaultdict(list)
    for batch in (asked[start : start + size] for start in range(0, len(asked), size)):
        _SEEN.clear()
        with kvprune.compress(model, Probe()):
            model(**encode(processor, [one.example for one in batch]).to(model.device))
        for name, values in _SEEN:
            found[name] += map(where_high, batch, values.double())
    return {name: means(rows) for name, rows in sorted(found.items())}


def scores(view: LayerView) -> dict[str, Tensor]:
    """Return scores of one layer's tokens, mean over heads, [B, 260] each; of features only in the first."""
    found = {
        "norm: length of values": get_policy("norm").score(view).mean(1),
        "h2o: attention of all rows": view.attention_mass().mean(1),
        "fastv: attention of the last row": view.window_mass(1).mean(1),
    }
    plain = {"keydiff: cosine to the mean key": -get_policy("keydiff").score(view).mean(1)}
    if view.rank == 0:
        features, places = view.features, view.places[0].double()  # [B, 260, C], [260, 2]
        nowhere = places[:, 0] < 0
        far = 1 - torch.exp(-torch.cdist(places, places).square() / 200)  # with topv's sigma of 10 patches
        far[nowhere] = far[:, nowhere] = 1
        off = (places - places[~nowhere].mean(0)).norm(dim=-1)
        off = torch.where(nowhere, 1, off / off[~nowhere].max())
        found |= {
            "visionzip, prumerge: class attention": view.class_attention,
            "topv: mass that its plan moves": get_policy("topv").importance(view),
            "topv: length of features": features.norm(dim=-1),
            "topv: cost of features": torch.cdist(features, features).square().mean(-1),
        }
        plain |= {"topv: cost of distance": far.mean(-1).expand(features.shape[:2])}
        plain |= {"topv: cost of being off the centre": off.expand(features.shape[:2])}
    return {name: score / score.mean(-1, keepdim=True) for name, score in found.items()} | plain


def where_high(question: Question, score: Tensor) -> Row:
    """Return where one score, [260], is high in one picture."""
    glyph, needs, patches = question.shows["glyph"], question.needs, ~question.shows["class token"]
    places = {"needed": needs, "other glyphs": glyph & ~needs, **question.shows}
    row = {f"on {name}": float(score[there].mean()) for name, there in places.items() if there.any()}
    ranks = score[patches].argsort().argsort().double()
    for name, there in (("rank corr. glyph", glyph), ("rank corr. needed", needs)):
        if there.any():
            row[name] = float(torch.corrcoef(torch.stack([ranks, there[patches].double()]))[0, 1])
    return row
