"""Problems that are always posed, small ones first: policies have failed on each kind of them."""

from __future__ import annotations

from kvprune.testing.problems import LayerProblem, ModelProblem

__all__ = ["LAYER_CORNERS", "MODEL_CORNERS"]

LAYER_CORNERS = (
    LayerProblem(layouts=("1t",), patches=1),  # one visible token
    LayerProblem(layouts=("1t",), patches=10),  # 0.1 of ten tokens
    LayerProblem(layouts=("4t",), patches=25),  # 0.07 of a hundred, in floats 7.000000000000001
    LayerProblem(layouts=("1t", "1t"), seed=1),
    LayerProblem(layouts=("1t", "3tt"), kv_heads=1, patches=3),  # ragged, left padding, GQA
    LayerProblem(layouts=("tt4ttt", "t1tt", "tt2tttt"), query_heads=4, rank=1),
    LayerProblem(layouts=("tt1ttt4tt",), rank=2),  # interleaved: early rows see what decoding does not
    LayerProblem(layouts=("tt4tt1tt", "t2tt", "14ttt")),  # several images, two of them adjacent
    LayerProblem(layouts=("tt4tt", "tttt", "2ttt")),  # a sample without an image
    LayerProblem(layouts=("2ttt", "1t"), content="equal"),
    LayerProblem(layouts=("2ttt", "1t"), content="zero", rank=1),
    LayerProblem(layouts=("2ttt", "1t1t"), content="ties", patches=3),
    LayerProblem(layouts=("2ttt", "1t"), content="huge", dtype="float16", patches=5),
    LayerProblem(layouts=("3tt", "t1t"), dtype="bfloat16", query_heads=6, kv_heads=3, contiguous=False),
    LayerProblem(layouts=("3tt", "1t"), dtype="float64", contiguous=False),
    LayerProblem(layouts=("4tt", "2tt", "tt"), rank=1, received=0.6),  # columns that do not exist
    LayerProblem(layouts=("1t3tt", "2tt"), arrived=1),  # a later turn, which brings one sample an image
    LayerProblem(layouts=("4tt", "1t"), family="encoder-decoder", patches=3),
    LayerProblem(layouts=("4tt", "2tt"), family="encoder-decoder", rank=1, received=0.6),
)

MODEL_CORNERS = (
    ModelProblem(layouts=("1t",)),
    ModelProblem(layouts=("4tttt", "4ttt")),
    ModelProblem(layouts=("tt4ttt", "t1tt", "tt2tttt"), beams=2),
    ModelProblem(layouts=("tt1ttt4tt",), dtype="float32"),
    ModelProblem(layouts=("tt4tt1tt", "t2tt", "14ttt"), kv_heads=4),
    ModelProblem(layouts=("tt4tt", "tttt", "2ttt"), kv_heads=1),
    ModelProblem(layouts=("ttttttt", "ttt"), model="bart", beams=2),
    ModelProblem(layouts=("tttt", "tttt"), model="bart", dtype="float32"),
)
