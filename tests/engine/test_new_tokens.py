"""New tokens in the place of columns: the oracle is the untouched model, fed the same features."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from family_checks import OLD
from generation import LAYOUTS, TOLERANCE, bart, generate, mllama
from new_tokens import Pairs, PairsAtLayer, PairsThen, compare_to_oracle

import kvprune
from kvprune.adapters import call
from kvprune.adapters.tiny.models import mllama_inputs
from kvprune.errors import CompressionStateError, SelectionError, UnsupportedModelError
from kvprune.testing import ModelProblem, masked_oracle
from kvprune.testing.conformance.policies.invariants import INVARIANTS
from kvprune.testing.conformance.policies.runner import Runner
from kvprune.tokens.replacement import Replacement, among
from kvprune.tokens.selection import Selection

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text("utf-8")
EXAMPLE = re.search(r"<!-- test: new tokens -->\n```python\n(.*?)```", PAGE, re.DOTALL)[1]

POLICIES = {
    "features": Pairs(),
    "layer": PairsAtLayer(),
    "twice": PairsAtLayer(again=1),
    "then-heads": PairsThen(then=kvprune.get_policy("h2o:keep_ratio=0.5")),
    "then-onward": PairsThen(then=kvprune.get_policy("trim:keep_ratio=0.5")),
    "then-merge": PairsThen(then=kvprune.get_policy("elastic:keep_ratio=0.5")),
    "then-bits": PairsThen(then=kvprune.get_policy("zipvl")),
}
TEXTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"reread": True}], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_a_run_equals_the_model_fed_the_same_features(name, options):
    inputs = mllama_inputs(LAYOUTS[4], 1, torch.float64)
    run, apart = compare_to_oracle(mllama(torch.float64), inputs, POLICIES[name], steps=3, **options)
    assert apart <= TOLERANCE[torch.float64]
    assert run.report.kept_fraction < 0.8
    assert run.report.bytes_held < run.report.bytes_full


@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_several_images_padding_and_samples_without_an_image(layouts):
    inputs = mllama_inputs(layouts, 1, torch.float64)
    _, apart = compare_to_oracle(mllama(torch.float64), inputs, Pairs(), steps=2)
    assert apart <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", POLICIES)
def test_encoder_decoder_models(name):
    _, apart = compare_to_oracle(bart(torch.float64), TEXTS, POLICIES[name], steps=3, num_beams=2)
    assert apart <= TOLERANCE[torch.float64]


def test_a_later_turn():
    model, dtype = mllama(torch.float64), torch.float64
    first, second = mllama_inputs(("t1tt",), 1, dtype), mllama_inputs(("t1ttt2tt",), 1, dtype)
    width = first["input_ids"].shape[1]
    later = {
        "input_ids": second["input_ids"][:, width:],
        "attention_mask": second["attention_mask"],
        "pixel_values": second["pixel_values"][:, 1:],
        "aspect_ratio_ids": second["aspect_ratio_ids"][:, 1:],
        "aspect_ratio_mask": second["aspect_ratio_mask"][:, 1:],
        "cross_attention_mask": second["cross_attention_mask"][
            :, 0 if OLD else width :
        ],  # 5.17 looks up its rows
    }
    kept = []
    with kvprune.compress(model, Pairs()) as run, torch.no_grad():
        run.record_replacements()
        one = model(**first)
        kept.append((run.selections, run.prefill_selections, run.replacements))
        got = model(**later, past_key_values=one.past_key_values).logits
        kept.append((run.selections, run.prefill_selections, run.replacements))
    with torch.no_grad():
        with masked_oracle(model, *kept[0][:2], replacements=kept[0][2]):
            one = model(**first)
        with masked_oracle(model, *kept[1][:2], replacements=kept[1][2]):
            wanted = model(**later, past_key_values=one.past_key_values).logits
    assert float((got - wanted).abs().max()) <= TOLERANCE[dtype]


def test_without_a_cache():
    model, inputs = mllama(torch.float64), mllama_inputs(LAYOUTS[2], 1, torch.float64)
    with kvprune.compress(model, Pairs()) as run, torch.no_grad():
        run.record_replacements()
        got = model(**inputs, use_cache=False).logits
    oracle = masked_oracle(model, run.selections, run.prefill_selections, replacements=run.replacements)
    with oracle, torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
    assert float((got - wanted).abs().max()) <= TOLERANCE[torch.float64]


def test_the_oracle_catches_new_tokens_that_no_layer_receives(monkeypatch):
    right = call.gather_features
    inputs = mllama_inputs(LAYOUTS[2], 1, torch.float64)
    monkeypatch.setattr(call, "gather_features", lambda features, received, _: right(features, received))
    with pytest.raises(AssertionError):
        compare_to_oracle(mllama(torch.float64), inputs, Pairs(), steps=3)


def test_features_are_kept_only_on_request():
    model, inputs = mllama(), mllama_inputs(LAYOUTS[0], 1)
    with kvprune.compress(model, Pairs()) as run:
        generate(model, inputs, steps=1)
        with pytest.raises(CompressionStateError, match=r"run\.record_replacements\(\)"):
            run.replacements  # noqa: B018
        run.record_replacements()
        generate(model, inputs, steps=1)
        assert set(run.replacements) == set(run.selections)
    with kvprune.compress(model, "divprune") as run:
        generate(model, inputs, steps=1)
    assert run.replacements == {}


def test_gradients_reach_what_made_the_tokens():
    scale = torch.ones((), requires_grad=True)

    @dataclass(frozen=True, kw_only=True)
    class Scaled(Pairs):
        def choose(self, view):
            made = super().choose(view).onward
            with torch.enable_grad():
                features = made.features.nan_to_num() * scale
            return kvprune.Decision(onward=kvprune.Replacement(features, made.places))

    model, inputs = mllama(), mllama_inputs(LAYOUTS[2], 1)
    with kvprune.compress(model, Scaled()):
        model(**inputs).logits.square().sum().backward()
    assert float(scale.grad.abs()) > 0
    model.zero_grad()


def test_compiled_decoding_with_a_static_cache():
    model, inputs = mllama(), mllama_inputs(LAYOUTS[2], 1)
    with kvprune.compress(model, Pairs()):
        wanted = generate(model, inputs, steps=3)[1]
        got = generate(model, inputs, steps=3, cache_implementation="static")[1]
    assert torch.allclose(got, wanted, atol=1e-5)


def test_as_the_branch_that_is_contrasted():
    model, inputs = mllama(), mllama_inputs(LAYOUTS[2], 1)
    plain = generate(model, inputs, steps=2)[1]
    with kvprune.contrast(model, Pairs(), "mint") as run:
        contrasted = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert contrasted.shape[1] == inputs["input_ids"].shape[1] + len(plain)
    assert 0 < run.report.against.kept_fraction < 1


# ---------------------------------------------------------------- what is refused


def places_of(*kept):
    return Selection.from_mask(torch.tensor(kept, dtype=torch.bool)[None, None])


@pytest.mark.parametrize(
    ("features", "places", "message"),
    [
        (torch.zeros(1, 3, 4), places_of(1, 0, 1), r"take features \[1, 2, C\], got \[1, 3, 4\]"),
        (torch.zeros(2, 4), places_of(1, 0, 1), r"take features \[1, 2, C\], got \[2, 4\]"),
        (torch.zeros(1, 2, 4).long(), places_of(1, 0, 1), "floating-point numbers, got torch.int64"),
        ([1.0], places_of(1, 0, 1), "got list and Selection"),
        (torch.zeros(1, 2, 4), torch.ones(1, 1, 2), "got Tensor and Tensor"),
        (torch.zeros(1, 2, 4), Selection.all(1, 2).repeat(2), "each of 2 samples"),
        (
            torch.zeros(1, 2, 4),
            Selection.from_mask(torch.ones(1, 2, 2, dtype=torch.bool)),
            r"all heads share the places of new tokens, so their indices are \[B, 1, K\], got \[1, 2, 2\]",
        ),
        (
            torch.zeros(1, 2, 4),
            Selection.from_mask(
                torch.ones(1, 1, 2, dtype=torch.bool), torch.full((1, 1, 2), 8, dtype=torch.uint8)
            ),
            "neither a merge nor bits",
        ),
    ],
)
def test_what_is_no_replacement(features, places, message):
    with pytest.raises(SelectionError, match=message):
        Replacement(features, places)


def changed(how):
    @dataclass(frozen=True, kw_only=True)
    class Changed(Pairs):
        def choose(self, view):
            made = super().choose(view).onward
            return kvprune.Decision(onward=how(view, Replacement(made.features.nan_to_num(), made.places)))

    return Changed()


def infinite(view, made):
    made.features[0, 0, 0] = torch.inf
    return made


def unseen(view, made):
    everything = Selection.all(view.batch, view.columns)
    return Replacement(view.features, everything)


def only_one_image(view, made):
    kept = made.places.mask & (view.images == 0)[:, None]
    places = Selection.from_mask(kept)
    return Replacement(made.features[:, : places.indices.shape[-1]], places)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda view, made: Replacement(made.features[..., 1:], made.places), "channels"),
        (lambda view, made: Replacement(made.features.double(), made.places), "in torch.float64, expected"),
        (lambda view, made: Replacement(made.features.to("meta"), made.places), "on meta, expected"),
        (infinite, "the features of 1 new tokens are NaN or infinite"),
        (unseen, "KV04: .*in places that no text row can see"),
        (only_one_image, "KV03: .*keeps no column of a visibility group"),
    ],
)
def test_replacements_that_do_not_fit_the_view(how, message):
    model, inputs = mllama(), mllama_inputs(("tt1ttt1tt",), 1)
    with pytest.raises(SelectionError, match=message), kvprune.compress(model, changed(how)):
        generate(model, inputs, steps=1)


def test_at_a_layer_the_policy_must_have_seen_the_features():
    @dataclass(frozen=True, kw_only=True)
    class Blind(PairsAtLayer):
        needs = frozenset()

        def select(self, view):
            places = Selection.from_mask(view.visible_in_prefill[:, None])
            return kvprune.Decision(onward=Replacement(torch.zeros(1, places.indices.shape[-1], 8), places))

    model = mllama()
    with pytest.raises(SelectionError, match="has not seen the features"), kvprune.compress(model, Blind()):
        generate(model, mllama_inputs(LAYOUTS[0], 1), steps=1)


def test_a_model_whose_layers_get_different_features_is_refused():
    model, inputs = mllama(), mllama_inputs(LAYOUTS[0], 1)

    def other(module, args, kwargs):
        return args, {**kwargs, "cross_attention_states": kwargs["cross_attention_states"] * 2}

    layer = model.model.language_model.layers[3]
    handle = layer.register_forward_pre_hook(other, with_kwargs=True)
    try:
        with (
            pytest.raises(UnsupportedModelError, match="layer 3 of this model gets other features"),
            kvprune.compress(model, Pairs()),
        ):
            generate(model, inputs, steps=1)
    finally:
        handle.remove()


def test_a_prefill_policy_cannot_replace_after_all_layers_have_attended():
    @dataclass(frozen=True, kw_only=True)
    class Late(kvprune.PrefillPolicy):
        name = "late"

        def observe(self, view):
            return None

        def conclude(self, views, observed):
            places = Selection.from_mask(views[0].visible_in_prefill[:, None])
            new = Replacement(torch.zeros(1, places.indices.shape[-1], 8), places)
            return [kvprune.Decision(onward=new) for _ in views]

    model = mllama()
    with pytest.raises(SelectionError, match="all of them have attended"), kvprune.compress(model, Late()):
        generate(model, mllama_inputs(LAYOUTS[0], 1), steps=1)


# ---------------------------------------------------------------- parts


def test_a_selection_among_new_tokens():
    places = Selection.from_mask(torch.tensor([[[True, False, True, True]], [[False, True, False, False]]]))
    whole = among(places, places)
    assert whole.indices[:, 0].tolist() == [[0, 1, 2], [0, 0, 0]]
    some = Selection.from_mask(torch.tensor([[[False, False, True, True]], [[False, True, False, False]]]))
    assert among(places, some).indices[:, 0].tolist() == [[1, 2], [0, 0]]


def test_the_example_of_the_page():
    space = {"__name__": "page"}
    exec(compile(EXAMPLE, "write-a-policy.md", "exec"), space)
    pairs = space["Pairs"]()
    inputs = mllama_inputs(LAYOUTS[4], 1, torch.float64)
    run, apart = compare_to_oracle(mllama(torch.float64), inputs, pairs, steps=2)
    assert apart <= TOLERANCE[torch.float64]
    assert 0.5 <= run.report.kept_fraction <= 0.6
    runner = Runner(seed=0, examples=8)
    for row in INVARIANTS:
        if row.id in ("KV01", "KV03", "KV13"):
            problem = ModelProblem(layouts=("tt2t", "t1t1t")) if row.on_models else None
            assert runner.check(row, [pairs], problem).outcome == "passed", row.id
