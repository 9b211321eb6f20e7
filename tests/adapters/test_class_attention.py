"""What adapters show of class tokens, against the weights of the vision tower's own eager attention."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from families import model_of
from generation import difference_to_oracle, generate
from transformers import DynamicCache

import kvprune
from kvprune import Decision, FeaturePolicy, Selection
from kvprune.adapters.class_attention import ClassAttention
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.errors import PolicyOptionError, UnsupportedModelError
from kvprune.session.compression import Compression
from kvprune.testing import mllama_inputs, tiny_mllama
from kvprune.testing.cost import PeakMemory

SEEN: list = []
LAYOUTS = ("tt4tt1tt", "t2tt", "13ttt", "tttt")  # several images, padding tiles, a sample without an image
TILES, PATCHES = 4, 5  # of the tiny model, the class token included; its tower pads tiles to 8


@dataclass(frozen=True, kw_only=True)
class Reader(FeaturePolicy):
    """Notes each view, and passes on every other column if told so."""

    name = "reader"
    half: bool = False
    declared: bool = True

    @property
    def needs(self):
        return frozenset({"class_attention"} if self.declared else ())

    def choose(self, view):
        SEEN.append((view, view.class_attention.clone()))
        if not self.half:
            return Decision()
        kept = view.visible_in_prefill.clone()
        kept[:, 1::2] = False
        kept[:, 0] |= ~kept.any(-1)
        return Decision(onward=Selection.from_mask(kept[:, None]))

    def select(self, view):
        SEEN.append((view, view.class_attention.clone()))
        return Decision()


@pytest.fixture
def seen():
    SEEN.clear()
    yield SEEN
    SEEN.clear()


def weights_of(model, run, encoder="global_transformer", layer=-1):
    """Weights of one self-attention of the tower, ``[images, heads, L, L]``, of the untouched model."""
    found = []
    module = getattr(model.model.vision_model, encoder).layers[layer].self_attn
    handle = module.register_forward_hook(lambda module, args, output: found.append(output[1]))
    with torch.no_grad():
        run()
    handle.remove()
    return found[-1].double()


def by_loops(weights, ids, exists):
    """The same numbers as views show, tile by tile."""
    padded = weights.shape[-1] // TILES
    rows = []
    for sample in range(len(ids)):
        row = []
        for image in range(ids.shape[1]):
            for tile in range(TILES):
                here = weights[sample * ids.shape[1] + image]
                first = tile * padded
                paid = [float(here[:, first, first + patch].sum()) for patch in range(1, PATCHES)]
                there = ids[sample, image] > 0 and exists[sample, image, tile]
                row += [0.0, *(number / sum(paid) if there else 0.0 for number in paid)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def truth_of(model, inputs, **where):
    weights = weights_of(model, lambda: model(**inputs), **where)
    return by_loops(weights, inputs["aspect_ratio_ids"], inputs["aspect_ratio_mask"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cached", [True, False])
def test_every_view_shows_the_models_own_weights(attention, cached, seen):
    inputs = mllama_inputs(LAYOUTS)
    truth = truth_of(model_of("Mllama", torch.float32, "eager"), inputs)
    model = model_of("Mllama", torch.float32, attention)
    with kvprune.compress(model, Reader()), torch.no_grad():
        model(**inputs, use_cache=cached)
    assert len(seen) == 4  # before the first layer, and at three
    for _, paid in seen:
        assert paid.dtype == torch.float32
        assert (paid - truth).abs().max() <= 1e-5
    by_tile = seen[0][1].view(4, -1, PATCHES)
    there = ((inputs["aspect_ratio_ids"] > 0)[..., None] & inputs["aspect_ratio_mask"].bool()).flatten(1)
    assert torch.allclose(by_tile.sum(-1), there.float())
    assert not by_tile[..., 0].any()
    assert truth[0, 1:5].std() > 1e-3  # the weights are not all alike


def test_rows_of_one_sample_are_shown_once(seen):
    inputs = mllama_inputs(LAYOUTS)
    model = model_of("Mllama", torch.float32, "eager")
    truth = truth_of(model, inputs)
    with kvprune.compress(model, Reader()):
        generate(model, inputs, steps=2, num_beams=3)
    assert [view.batch for view, _ in seen] == [4] * 4
    assert all((paid - truth).abs().max() <= 1e-5 for _, paid in seen)


def test_later_layers_show_what_they_received(seen):
    inputs = mllama_inputs(("4ttt", "t2tt"))
    model = model_of("Mllama", torch.float32, "eager")
    truth = truth_of(model, inputs)
    with kvprune.compress(model, Reader(half=True)), torch.no_grad():
        model(**inputs)
    for view, paid in seen[1:]:
        assert paid.shape == (2, view.columns)
        assert (paid[0] - truth[0, ::2]).abs().max() <= 1e-5
        assert (paid[1, :5] - truth[1, :10:2]).abs().max() <= 1e-5
        assert not paid[1, 5:].any()  # only pads


def test_a_later_turn_shows_new_images_only(seen):
    model = model_of("Mllama", torch.float32, "eager")
    whole = mllama_inputs(("tt4tt1tt", "t1tt2tt"))
    text = ("input_ids", "attention_mask", "cross_attention_mask")
    image = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    first = {k: whole[k][:, :5] for k in text} | {k: whole[k][:, :1] for k in image}
    first["cross_attention_mask"] = first["cross_attention_mask"][:, :, :1]
    second = {k: whole[k][:, 5:] if k == "input_ids" else whole[k] for k in text}
    second |= {k: whole[k][:, 1:] for k in image}

    def turns():
        cache = DynamicCache(config=model.config.text_config)
        model(**first, past_key_values=cache)
        SEEN.clear()
        model(**second, past_key_values=cache)

    truth = by_loops(weights_of(model, turns), second["aspect_ratio_ids"], second["aspect_ratio_mask"])
    with kvprune.compress(model, Reader()), torch.no_grad():
        turns()
    assert len(seen) == 4
    assert all((paid - truth).abs().max() <= 1e-5 for _, paid in seen)


def test_another_layer_is_one_class_attribute_away(seen):
    class Local(MllamaAdapter):
        class_attention_layer = ("transformer", -2)

    inputs = mllama_inputs(LAYOUTS)
    model = model_of("Mllama", torch.float32, "eager")
    truth = truth_of(model, inputs, encoder="transformer", layer=-2)
    with Compression(Local(model), Reader(), 0), torch.no_grad():
        model(**inputs)
    assert (seen[0][1] - truth).abs().max() <= 1e-5
    assert (truth - truth_of(model, inputs)).abs().max() > 1e-3


def test_low_precision_is_computed_in_float32(seen):
    inputs = mllama_inputs(("t4tt",), dtype=torch.bfloat16)
    model = tiny_mllama(1, dtype=torch.bfloat16, attn_implementation="eager")
    with kvprune.compress(model, Reader()), torch.no_grad():
        model(**inputs)
    truth = truth_of(model, inputs)
    assert seen[0][1].dtype == torch.float32
    assert (seen[0][1] - truth).abs().max() <= 2e-2  # the model's own are rounded


def test_a_class_token_that_ignores_its_tile_gives_no_nan(seen):
    model = tiny_mllama(1)
    attention = model.model.vision_model.global_transformer.layers[-1].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(300)
    with kvprune.compress(model, Reader()), torch.no_grad():
        model(**mllama_inputs(("4ttt",)))
    paid = seen[0][1]
    assert paid.isfinite().all()
    assert torch.allclose(paid.view(TILES, -1).sum(-1), torch.ones(TILES))


def test_it_is_captured_only_if_needed_and_nothing_stays(seen, monkeypatch):
    hooked = []
    hook = ClassAttention.hook
    monkeypatch.setattr(ClassAttention, "hook", lambda self, adapter: hooked.append(hook(self, adapter)))
    model, inputs = model_of("Mllama", torch.float32), mllama_inputs(("t2tt",))
    with kvprune.compress(model, "trim"), torch.no_grad():
        model(**inputs)
    with (
        pytest.raises(PolicyOptionError, match=r"reads view\.class_attention .* without declaring"),
        kvprune.compress(model, Reader(declared=False)),
        torch.no_grad(),
    ):
        model(**inputs)
    assert hooked == []
    with kvprune.compress(model, Reader()) as run:
        generate(model, inputs, steps=3)
        tower = model.model.vision_model
        assert not any(module._forward_hooks for module in tower.modules())
    assert len(hooked) == 1
    assert run.report.prefills == 1


def test_encoder_states_that_are_passed_directly_are_refused(seen):
    model, inputs = model_of("Mllama", torch.float32), mllama_inputs(("t2tt",))
    states = torch.randn(1, TILES * PATCHES, 32)
    given = {
        k: v for k, v in inputs.items() if k not in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    }
    with kvprune.compress(model, Reader()), torch.no_grad():
        with pytest.raises(UnsupportedModelError, match=r"the vision tower computes.*pass pixel_values"):
            model(**given, cross_attention_states=states)
        model(**inputs)  # and the next call is served
    assert len(seen) == 4


@pytest.mark.parametrize("family", ["BART", "Whisper"])
def test_models_without_class_tokens_are_refused_by_need(family):
    with pytest.raises(UnsupportedModelError, match=f"needs 'class_attention', which the {family} adapter"):
        kvprune.compress(model_of(family, torch.float32), "visionzip")


@pytest.mark.parametrize(
    "spec", ["visionzip:keep_ratio=0.4", "prumerge", "prumerge:keep_ratio=0.4,plus=true"]
)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_equals_the_oracle(spec, beams):
    model = model_of("Mllama", torch.float64)
    inputs = mllama_inputs(LAYOUTS, dtype=torch.float64)
    assert difference_to_oracle(model, inputs, spec, num_beams=beams) <= 1e-6


def test_attention_of_all_to_all_is_never_held():
    """At the dimensions of Llama-3.2-11B-Vision: 16 heads, 4 tiles of 1608 tokens, 1280 wide."""
    module = torch.nn.Module()
    module.num_heads, module.scaling = 16, 80**-0.5
    capture = ClassAttention("?", module, 1601, torch.ones(1, 1, TILES, dtype=torch.bool))
    queries, keys = torch.randn(2, 1, TILES * 1608, 1280, dtype=torch.bfloat16)
    with PeakMemory() as memory:
        capture._after_q_proj(module, (), {}, queries)
        capture._after_k_proj(module, (), {}, keys)
        capture._after_module(module, (), {"attention_mask": None}, None)
    assert capture.by_column().shape == (1, TILES * 1601)
    assert memory.peak <= 24 * 2**20, f"{memory.peak / 2**20:.1f} MiB"
